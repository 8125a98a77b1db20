"""Ceilings: who knows the world solves everything, who knows the shortcut solves training data, who saw pairs those."""

from __future__ import annotations

import numpy as np
import pytest
from effml_rl.solution_tree import SolutionTreeTask, seen_pairs, solvable
from effml_rl.solution_tree.reference_solvers import CLUES, shortcut_plan, solve
from effml_rl.solution_tree.tables import Tables
from effml_shared.errors import ConfigError

TASK = SolutionTreeTask()


@pytest.mark.parametrize("split", ["sft", "rl", "test"])
def test_the_exact_solver_is_never_wrong(split: str) -> None:
    examples = TASK.sample(2000, split)
    states, actions = solve(TASK.tables, examples)
    assert np.array_equal(states, examples.states)
    assert np.array_equal(actions, examples.actions)


def shortcut_accuracy(tables: Tables, task: SolutionTreeTask, split: str, clue: str) -> float:
    examples = task.sample(20_000, split)
    kept = examples.actions >= 0
    return float((shortcut_plan(tables, examples, clue) == examples.actions)[kept].mean())


def test_shortcuts_work_in_fine_tuning_data_only() -> None:
    found = {clue: shortcut_accuracy(TASK.tables, TASK, "sft", clue) for clue in CLUES}
    assert found["both"] == pytest.approx(0.58, abs=0.015)
    assert found["context"] == pytest.approx(0.34, abs=0.015)
    assert found["state"] == pytest.approx(0.29, abs=0.015)
    for clue in CLUES:
        assert shortcut_accuracy(TASK.tables, TASK, "test", clue) == pytest.approx(1 / 20, abs=0.005)
    with pytest.raises(ConfigError, match=r"clue: got 'problem'"):
        shortcut_plan(TASK.tables, TASK.sample(1), "problem")


def test_the_seen_solver_solves_exactly_the_solvable() -> None:
    shown = TASK.sample(200_000, "sft")
    seen = seen_pairs(TASK.tables, shown)
    test = TASK.sample(20_000)
    states, actions = solve(TASK.tables, test, seen)
    solved = (states == test.states).all(1) & (actions == test.actions).all(1)
    assert np.array_equal(solved, solvable(test, seen))
    assert seen.sum() == 378
    assert solved.mean() == pytest.approx(0.655, abs=0.01)


def test_an_unknown_effect_ends_knowledge_of_states_but_not_the_plan() -> None:
    test = TASK.sample(100)
    states, actions = solve(TASK.tables, test, np.zeros((20, 20), bool))
    assert np.array_equal(actions, test.actions)
    assert np.array_equal(states[:, 0], test.states[:, 0])
    assert (states[:, 1:] == -1).all()
