"""Pairs that training data show, and the paths they make solvable, against sets."""

from __future__ import annotations

import numpy as np
import pytest
from effml_rl.solution_tree import SolutionTreeTask, seen_pairs, solvable, unseen_pairs
from effml_shared.errors import ConfigError

TASK = SolutionTreeTask(n_states=6, n_actions=4, n_contexts=5, n_problem=5, len_range=(1, 5), n_irrelevant=1)


def test_seen_and_unseen_pairs_are_those_of_sets() -> None:
    shown = TASK.sample(6, "sft")
    seen = seen_pairs(TASK.tables, shown)
    expected = {pair for example in shown for pair in zip(example.states, example.actions, strict=False)}
    assert {(int(s), int(a)) for s, a in np.argwhere(seen)} == expected
    test = TASK.sample(300)
    missing = [set(zip(example.states, example.actions, strict=False)) - expected for example in test]
    assert unseen_pairs(test, seen).tolist() == [len(pairs) for pairs in missing]
    assert solvable(test, seen).tolist() == [not pairs for pairs in missing]
    assert 0 < solvable(test, seen).mean() < 1


def test_everything_and_nothing_seen() -> None:
    test = TASK.sample(50)
    assert solvable(test, np.ones((6, 4), bool)).all()
    assert not solvable(test, np.zeros((6, 4), bool)).any()
    assert not seen_pairs(TASK.tables, test.select(slice(0, 0))).any()
    with pytest.raises(ConfigError, match=r"seen: got int64 of shape \(6, 4\), expected bool"):
        unseen_pairs(test, np.zeros((6, 4), np.int64))
