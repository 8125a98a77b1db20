"""The world of the solution-tree task: what is drawn, and what cannot be a world."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from effml_rl.solution_tree.tables import Tables
from effml_shared.errors import ConfigError

SIZES: dict[str, Any] = {"n_states": 20, "n_actions": 20, "n_contexts": 20, "n_problem": 20, "alpha": 0.3, "beta": 0.3}


def draw(**changes: Any) -> Tables:
    return Tables.draw(**(SIZES | {"seed": 0} | changes))


def test_rows_are_what_they_should_be() -> None:
    tables = draw()
    assert np.array_equal(np.sort(tables.problem_moves, 1), np.tile(np.arange(20), (20, 1)))
    assert any(len(set(row)) < 20 for row in tables.transitions.tolist())  # no permutations
    np.testing.assert_allclose(tables.action_prior.sum(1), 1)
    np.testing.assert_allclose(tables.context_given_action.sum(1), 1)


def test_the_tables_of_a_seed_never_change() -> None:
    tables = draw()
    assert tables.transitions[0, :8].tolist() == [12, 15, 0, 3, 3, 7, 9, 19]
    assert np.array_equal(tables.problem_moves, draw().problem_moves)
    assert not np.array_equal(tables.transitions, draw(seed=1).transitions)


def test_an_action_is_told_by_its_effect_or_none_is() -> None:
    tables = draw(n_actions=3, n_problem=5)
    for p in range(5):
        for a in range(3):
            assert tables.action_between[p, tables.problem_moves[p, a]] == a
    assert (tables.action_between == -1).sum() == 5 * (5 - 3)
    assert tables.n_integers == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_actions": 21}, r"n_actions: got 21, expected at most n_problem = 20"),
        ({"alpha": 0.0}, r"alpha: got 0.0"),
        ({"beta": -1.0}, r"beta: got -1.0"),
        ({"beta": float("nan")}, r"beta: got nan"),
        ({"alpha": float("inf")}, r"alpha: got inf"),
        ({"n_states": 0}, r"n_states: got 0"),
        ({"n_contexts": 2.0}, r"n_contexts: got 2.0"),
        ({"seed": -1}, r"seed: got -1"),
        ({"seed": 2**32}, r"seed: got 4294967296"),
    ],
)
def test_impossible_worlds_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw(**changes)


def test_given_tables_are_checked() -> None:
    tables = draw()
    doubled = tables.problem_moves.copy()
    doubled[3, 0] = doubled[3, 1]
    for changes, message in (
        ({"problem_moves": doubled}, r"problem_moves: got two actions with one effect"),
        ({"transitions": tables.transitions + 1}, r"transitions: got an entry that is no state"),
        ({"transitions": tables.transitions.astype(np.int32)}, r"transitions: .* expected int64"),
        ({"action_prior": tables.action_prior * 2}, r"action_prior: got rows that are no distributions"),
        ({"action_prior": tables.action_prior * np.nan}, r"action_prior: got rows that are no distributions"),
        ({"action_prior": tables.action_prior[:3]}, r"tables: got sizes that do not fit"),
        ({"transitions": tables.transitions[0]}, r"tables: got something else"),
    ):
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(tables, **changes)
