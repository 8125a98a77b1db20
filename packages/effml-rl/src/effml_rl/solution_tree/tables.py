"""The world of the solution-tree task: what an action does, and how actions and contexts are distributed in training.

    T[s, a]     the state that action a leads to from state s, uniform: several actions may lead to one state
    q[s, a]     probability of action a in state s, Dirichlet(alpha) per state; fine-tuning data only
    M[p, a]     the problem state that a leads to from p, no two to one: (p, M[p, a]) tells a
    e[a, c]     probability of context c under action a, Dirichlet(beta) per action; fine-tuning data only

They are drawn in that order from one generator. The generator is NumPy's `RandomState`, whose stream is frozen for all
future releases: a seed is these tables forever.

Source: arXiv 2505.22756, synthetic task.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError
from numpy.typing import NDArray

__all__ = ["Integers", "Probabilities", "Tables"]

Integers = NDArray[np.int64]
Probabilities = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Tables:
    """The four tables.

    Raises:
        ConfigError: shapes do not fit each other, an entry is out of range, an action is not told by its effect.

    >>> tables = Tables.draw(n_states=4, n_actions=3, n_contexts=2, n_problem=5, alpha=0.3, beta=0.3, seed=0)
    >>> p, a = 2, 1
    >>> int(tables.action_between[p, tables.problem_moves[p, a]])
    1
    """

    transitions: Integers  # T, (states, actions)
    action_prior: Probabilities  # q, (states, actions)
    problem_moves: Integers  # M, (problem states, actions)
    context_given_action: Probabilities  # e, (actions, contexts)

    @classmethod
    def draw(
        cls, *, n_states: int, n_actions: int, n_contexts: int, n_problem: int, alpha: float, beta: float, seed: int
    ) -> Tables:
        """Draw tables of these sizes; alpha and beta are Dirichlet concentrations, small for strong shortcuts.

        Raises:
            ConfigError: a size is below 1, there are more actions than problem states, or a concentration is not > 0.
        """
        for name, size in (("n_states", n_states), ("n_actions", n_actions), ("n_contexts", n_contexts)):
            check_count(name, size, 1)
        check_count("n_problem", n_problem, 1)
        check_count("seed", seed, 0)
        check_range("seed", seed, 0, 2**32)
        if n_actions > n_problem:
            raise ConfigError(f"n_actions: got {n_actions}, expected at most n_problem = {n_problem}, one effect each")
        for name, concentration in (("alpha", alpha), ("beta", beta)):
            if not 0 < concentration < math.inf:
                raise ConfigError(f"{name}: got {concentration}, expected a finite number above 0")
        rng = np.random.RandomState(seed)
        transitions = rng.randint(0, n_states, (n_states, n_actions)).astype(np.int64)
        action_prior = rng.dirichlet([alpha] * n_actions, n_states)
        problem_moves = np.stack([rng.permutation(n_problem)[:n_actions] for _ in range(n_problem)]).astype(np.int64)
        return cls(transitions, action_prior, problem_moves, rng.dirichlet([beta] * n_contexts, n_actions))

    def __post_init__(self) -> None:
        if not all(
            isinstance(table, np.ndarray) and table.ndim == 2 and table.size
            for table in (self.transitions, self.action_prior, self.problem_moves, self.context_given_action)
        ):
            raise ConfigError("tables: got something else, expected four arrays of two dimensions each")
        shape = self.transitions.shape
        if self.action_prior.shape != shape or {self.problem_moves.shape[1], len(self.context_given_action)} != {
            shape[1]
        }:
            raise ConfigError(f"tables: got sizes that do not fit transitions of {shape} (states, actions)")
        for name, table, size in (
            ("transitions", self.transitions, self.n_states),
            ("problem_moves", self.problem_moves, self.n_problem),
        ):
            if table.dtype != np.int64 or table.min() < 0 or table.max() >= size:
                raise ConfigError(f"{name}: got an entry that is no state, expected int64 in [0, {size})")
        if any(len(set(row)) < len(row) for row in self.problem_moves.tolist()):
            raise ConfigError("problem_moves: got two actions with one effect, expected rows without repetition")
        for name, rows in (("action_prior", self.action_prior), ("context_given_action", self.context_given_action)):
            if rows.dtype != np.float64 or not (rows.min() >= 0 and np.allclose(rows.sum(1), 1)):
                raise ConfigError(f"{name}: got rows that are no distributions, expected float64 that sum to 1")

    @property
    def n_states(self) -> int:
        return self.transitions.shape[0]

    @property
    def n_actions(self) -> int:
        return self.transitions.shape[1]

    @property
    def n_problem(self) -> int:
        return self.problem_moves.shape[0]

    @property
    def n_contexts(self) -> int:
        return self.context_given_action.shape[1]

    @property
    def n_integers(self) -> int:
        """How many integers the vocabulary needs: the largest of the sizes."""
        return max(self.n_states, self.n_actions, self.n_contexts, self.n_problem)

    @cached_property
    def action_between(self) -> Integers:
        """(problem states, problem states): the action that leads from one to the other, -1 where none does."""
        inverse = np.full((self.n_problem, self.n_problem), -1, np.int64)
        np.put_along_axis(inverse, self.problem_moves, np.arange(self.n_actions)[None, :], axis=1)
        return inverse
