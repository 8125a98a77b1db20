"""Solvers that need no training: the ceiling of a policy that knows a part of the world.

solve           reads the plan off the problem states, and executes it by T: everything, or what training data show of T
shortcut_plan   guesses each action from state and context, by the training distribution: what memorising correlations
                is worth; the problem states are not looked at

Both read only what a prompt shows, but for the shortcut, which is told the right previous state at every step.

Source: the causal rule and the shortcuts of arXiv 2505.22756; the solvers are our own.
"""

from __future__ import annotations

import numpy as np
from effml_shared.checks import check_choice
from numpy.typing import NDArray

from effml_rl.solution_tree.examples import Examples
from effml_rl.solution_tree.tables import Integers, Tables

__all__ = ["CLUES", "shortcut_plan", "solve"]

CLUES = ("both", "state", "context")


def solve(tables: Tables, examples: Examples, seen: NDArray[np.bool_] | None = None) -> tuple[Integers, Integers]:
    """Return states (problems, longest + 1) and actions (problems, longest); -1 beyond a path's length.

    Args:
        seen: pairs whose effect is known, (states, actions) bool; None: all. From an unknown effect on, states are -1.
    """
    problems = examples.problem_states
    on_path = problems[:, 1:] >= 0
    actions = np.where(on_path, tables.action_between[problems[:, :-1], problems[:, 1:]], -1)
    states = np.full_like(problems, -1)
    states[:, 0] = examples.states[:, 0]
    effects = tables.transitions if seen is None else np.where(seen, tables.transitions, -1)
    for i in range(actions.shape[1]):
        known = on_path[:, i] & (states[:, i] >= 0)
        states[:, i + 1] = np.where(known, effects[states[:, i], actions[:, i]], -1)
    return states, actions


def shortcut_plan(tables: Tables, examples: Examples, clue: str = "both") -> Integers:
    """Return the likeliest action at every step, (problems, longest); -1 beyond a path's length.

    Args:
        clue: what it is guessed from: `"state"` by q, `"context"` by e and the mean of q over states, or `"both"`.
    """
    check_choice("clue", clue, CLUES)
    likelihood = tables.context_given_action.T[examples.contexts]  # (problems, longest, actions)
    prior = tables.action_prior[examples.states[:, :-1]]
    score = {"state": prior, "context": likelihood * tables.action_prior.mean(0), "both": prior * likelihood}[clue]
    return np.where(examples.actions >= 0, score.argmax(-1), -1)
