"""The generator: its invariants, its distributions, and numbers that cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from effml_rl.solution_tree import Examples, SolutionTreeTask
from effml_rl.solution_tree.tables import Tables
from effml_shared.errors import ConfigError
from numpy.typing import NDArray
from scipy import stats

TASK = SolutionTreeTask()


def check_fit(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> None:
    """Chi-square of rows of counts against rows of probabilities, cells of expectation below 5 pooled per row."""
    statistic, freedom = 0.0, 0
    for row, law in zip(counts, probabilities, strict=True):
        expected = law * row.sum()
        rare = expected < 5
        observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (row, expected))
        if expected[-1] < 5:
            observed, expected = observed[:-1], expected[:-1]
        statistic += ((observed - expected) ** 2 / expected).sum()
        freedom += max(len(expected) - 1, 0)
    assert stats.chi2.sf(statistic, freedom) > 1e-3


def pairs(rows: NDArray[np.int64], columns: NDArray[np.int64], shape: tuple[int, int]) -> NDArray[np.int64]:
    counts = np.zeros(shape, np.int64)
    np.add.at(counts, (rows, columns), 1)
    return counts


def visited(examples: Examples) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    kept = examples.actions >= 0
    return examples.states[:, :-1][kept], examples.actions[kept], examples.contexts[kept]


@pytest.mark.parametrize("split", ["sft", "rl", "test"])
def test_paths_obey_the_tables(split: str) -> None:
    examples = TASK.sample(10_000, split)
    kept = examples.actions >= 0
    assert set(examples.lengths.tolist()) == set(range(5, 11))
    assert np.array_equal(kept, np.arange(10) < examples.lengths[:, None])
    state, action, _ = visited(examples)
    assert np.array_equal(examples.states[:, 1:][kept], TASK.tables.transitions[state, action])
    before, after = examples.problem_states[:, :-1][kept], examples.problem_states[:, 1:][kept]
    assert np.array_equal(TASK.tables.problem_moves[before, action], after)
    assert np.array_equal(TASK.tables.action_between[before, after], action)
    assert (examples.states[:, 1:][~kept] == -1).all()
    assert (examples.contexts[~kept] == -1).all()
    assert (examples.irrelevant >= 0).all()
    assert (examples.irrelevant < 20).all()


def test_fine_tuning_data_follow_the_skewed_laws() -> None:
    state, action, context = visited(TASK.sample(20_000, "sft"))
    check_fit(pairs(state, action, (20, 20)), TASK.tables.action_prior)
    check_fit(pairs(action, context, (20, 20)), TASK.tables.context_given_action)


@pytest.mark.parametrize("split", ["rl", "test"])
def test_other_data_are_uniform_and_contexts_tell_nothing(split: str) -> None:
    examples = TASK.sample(20_000, split)
    state, action, context = visited(examples)
    uniform = np.full((20, 20), 1 / 20)
    check_fit(pairs(state, action, (20, 20)), uniform)
    check_fit(pairs(action, context, (20, 20)), uniform)
    for values in (examples.states[:, 0], examples.problem_states[:, 0], examples.irrelevant[:, 3]):
        check_fit(np.bincount(values, minlength=20)[None], uniform[:1])
    check_fit(np.bincount(examples.lengths - 5, minlength=6)[None], np.full((1, 6), 1 / 6))


def test_a_problem_depends_on_its_number_alone() -> None:
    many = list(TASK.sample(50, "sft"))
    assert list(TASK.sample(7, "sft")) == many[:7]
    assert list(TASK.sample(20, "sft", start=30)) == many[30:]
    assert list(TASK.sample(50, "rl")) != list(TASK.sample(50, "test"))
    assert list(TASK.sample(50, "sft", seed=1)) != many
    assert len(TASK.sample(0, "rl")) == 0


def test_given_tables_are_used() -> None:
    tables = Tables.draw(n_states=4, n_actions=2, n_contexts=3, n_problem=5, alpha=1.0, beta=1.0, seed=9)
    task = SolutionTreeTask(4, 2, 3, 5, (1, 2), 1, world=tables)
    assert task.tables is tables
    assert task.tokenizer.vocab_size == 9 + 5
    with pytest.raises(ConfigError, match=r"world: got \{'n_states': 4.*\}, expected the sizes of the task"):
        SolutionTreeTask(world=tables)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"len_range": (3, 2)}, r"len_range: got \(3, 2\), expected 1 <= fewest <= most"),
        ({"len_range": (0, 2)}, r"len_range: got \(0, 2\)"),
        ({"len_range": (1.0, 2)}, r"len_range: .* expected two integers"),
        ({"len_range": "58"}, r"len_range: got '58', expected two integers"),
        ({"len_range": 5}, r"len_range: got 5"),
        ({"n_irrelevant": -1}, r"n_irrelevant: got -1"),
        ({"n_actions": 30}, r"n_actions: got 30"),
        ({"alpha": 0}, r"alpha: got 0"),
    ],
)
def test_impossible_tasks_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SolutionTreeTask(**changes)


def test_unknown_splits_and_negative_numbers_are_refused() -> None:
    for arguments, message in (
        ({"n": 3, "split": "train"}, r"split: got 'train', expected one of 'sft', 'rl', 'test'"),
        ({"n": -1}, r"n: got -1"),
        ({"n": 1, "start": -1}, r"start: got -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            TASK.sample(**arguments)
