"""The record of outcomes: its parts, its file, and what cannot be one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from effml_rl.tree_file import save_tree
from effml_rl.wall.correct_matrix import KIND, CorrectMatrix, check_paired
from effml_shared.errors import CheckpointError, ConfigError

RNG = np.random.default_rng(0)
GRID = np.array([0.1, 0.5, 1.0])
OUTCOMES = RNG.integers(0, 2, (3, 5, 7)).astype(np.int8)
GREEDY = np.array([1, 0, 1, -1, 0], np.int8)


def test_counts_and_parts() -> None:
    outcomes = OUTCOMES.copy()
    outcomes[1, 2] = -1
    matrix = CorrectMatrix(GRID, outcomes, GREEDY)
    assert (matrix.n_problems, matrix.n) == (5, 7)
    assert matrix.scored[1].tolist() == [7, 7, 0, 7, 7]
    assert matrix.correct[1, 2] == 0
    assert matrix.index(0.1 + 0.4) == 1
    for chosen in ([3, 1], np.array([False, True, False, True, False])):
        part = matrix.select(chosen)
        assert sorted(part.correct[0].tolist()) == sorted(matrix.correct[0, [1, 3]].tolist())
    first, second = matrix.halves()
    assert (first.n, second.n) == (3, 3)
    assert np.array_equal(first.outcomes, outcomes[:, :, [0, 2, 4]])
    assert np.array_equal(second.outcomes, outcomes[:, :, [1, 3, 5]])
    assert CorrectMatrix(GRID, OUTCOMES == 1).correct.tolist() == CorrectMatrix(GRID, OUTCOMES).correct.tolist()


def test_a_file_gives_the_same_matrix(tmp_path: Path) -> None:
    path = tmp_path / "matrix.safetensors"
    matrix = CorrectMatrix(GRID, OUTCOMES, GREEDY, "these")
    matrix.select([4, 0]).halves()[1].save(path)  # views of other arrays
    assert CorrectMatrix.load(path).outcomes.tolist() == OUTCOMES[:, [4, 0], 1:6:2].tolist()
    matrix.save(path)
    loaded = CorrectMatrix.load(path)
    assert loaded.temperatures.tolist() == GRID.tolist()
    assert np.array_equal(loaded.outcomes, OUTCOMES)
    assert loaded.greedy is not None
    assert (loaded.greedy.tolist(), loaded.problems) == (GREEDY.tolist(), "these")
    large = CorrectMatrix(np.arange(1.0, 14), np.zeros((13, 512, 128), np.int8))
    large.save(path)
    assert path.stat().st_size < 853_000


def test_damaged_files_are_told_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "matrix.safetensors"
    tree = CorrectMatrix(GRID, OUTCOMES).tree()
    for damage in ({"temperatures": [1.0]}, {"temperatures": "x"}, {"outcomes": None}, {"greedy": 3}):
        save_tree(path, KIND, tree | damage)
        with pytest.raises(CheckpointError, match=r"^[^\n]*got no whole matrix[^\n]*$"):
            CorrectMatrix.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperatures": [0.1, 0.5]}, r"outcomes: got outcomes of \(3, 5, 7\) at temperatures of \(2,\)"),
        ({"temperatures": [0.0, 0.5, 1.0]}, r"temperatures: got \[0.0, 0.5, 1.0\], expected increasing"),
        ({"temperatures": [0.5, 0.5, 1.0]}, r"temperatures: got"),
        ({"temperatures": [0.5, 1.0, np.nan]}, r"temperatures: got"),
        ({"temperatures": [0.5, 1.0, np.inf]}, r"temperatures: got"),
        ({"outcomes": OUTCOMES[:, :, :0]}, r"outcomes: got .* none empty"),
        ({"outcomes": OUTCOMES[0]}, r"outcomes: got"),
        ({"outcomes": OUTCOMES * 2}, r"outcomes: got int8 in \[0, 2\]"),
        ({"outcomes": OUTCOMES.astype(float)}, r"outcomes: got float64"),
        ({"greedy": GREEDY[:4]}, r"greedy: got \(4,\), expected one outcome for 5 problems"),
        ({"greedy": GREEDY[:0]}, r"greedy: got \(0,\)"),
    ],
)
def test_what_is_no_matrix_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CorrectMatrix(**({"temperatures": GRID, "outcomes": OUTCOMES} | changes))


def test_unknown_rows_are_refused() -> None:
    matrix = CorrectMatrix(GRID, OUTCOMES)
    with pytest.raises(ConfigError, match=r"temperature: got 0.7, expected one of \[0.1, 0.5, 1.0\]"):
        matrix.index(0.7)
    problems: Any
    for problems in ([5], [-1], [], np.zeros(5, bool), np.ones(4, bool), [0.5], [[1]]):
        with pytest.raises(ConfigError, match=r"problems: got"):
            matrix.select(problems)
    with pytest.raises(ConfigError, match=r"n: got 1, expected at least 2"):
        CorrectMatrix(GRID, OUTCOMES[:, :, :1]).halves()


def test_only_the_same_problems_with_as_many_samples_are_a_pair() -> None:
    matrix = CorrectMatrix(GRID, OUTCOMES, problems="these")
    check_paired(matrix, CorrectMatrix(GRID[:1], OUTCOMES[:1], problems="these"))
    check_paired(matrix, CorrectMatrix(GRID, OUTCOMES))
    check_paired(matrix.select([0, 1]), matrix.select([0, 1]))
    for other, message in (
        (CorrectMatrix(GRID, OUTCOMES, problems="others"), r"after: got other problems"),
        (CorrectMatrix(GRID, OUTCOMES[:, :4]), r"after: got other problems"),
        (CorrectMatrix(GRID, OUTCOMES[:, :, :4]), r"after: got 4 samples per problem, expected 7"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_paired(matrix, other)
    with pytest.raises(ConfigError, match=r"after: got other problems"):
        check_paired(matrix.select([0, 1]), matrix.select([1, 0]))
