"""Curves over temperature by hand, luck by the binomial, and the bias of the best."""

from __future__ import annotations

import math

import numpy as np
import pytest
from effml_rl.wall.correct_matrix import CorrectMatrix
from effml_rl.wall.temperature_curves import (
    accuracy,
    best_over_temperature,
    chance_coverage,
    coverage,
    held_out_best,
    pass_at_k_curve,
    precision,
    union_coverage,
)
from effml_shared.errors import ConfigError
from numpy.typing import ArrayLike, NDArray


def from_counts(counts: ArrayLike, n: int) -> CorrectMatrix:
    """A matrix whose problems have these counts (temperatures, problems) of right samples."""
    outcomes = (np.arange(n) < np.asarray(counts)[..., None]).astype(np.int8)
    return CorrectMatrix(np.arange(1, len(outcomes) + 1) / 2, outcomes)


HAND = from_counts([[0, 1, 3, 128]], 128)


def test_one_temperature_by_hand() -> None:
    assert precision(HAND).tolist() == [[0.0, 1 / 128, 3 / 128, 1.0]]
    assert accuracy(HAND).tolist() == [0.2578125]
    assert coverage(HAND).tolist() == [0.75]
    assert coverage(HAND, more_than=2).tolist() == [0.5]
    assert pass_at_k_curve(HAND, 16)[0] == pytest.approx(np.mean([0, 0.125, 0.332349, 1]), abs=1e-6)
    assert pass_at_k_curve(HAND, 16)[0] == pytest.approx(0.364337, abs=1e-6)
    assert pass_at_k_curve(HAND, 1) == pytest.approx(accuracy(HAND), abs=1e-12)
    assert pass_at_k_curve(HAND, 128) == pytest.approx(coverage(HAND), abs=1e-12)


def test_best_and_union_over_temperatures() -> None:
    matrix = from_counts([[4, 0, 0], [2, 2, 0], [0, 0, 1]], 4)
    assert best_over_temperature(matrix) == (pytest.approx(1 / 3), 0.5)
    assert best_over_temperature(matrix, coverage) == (pytest.approx(2 / 3), 1.0)
    assert best_over_temperature(matrix, lambda m: coverage(m, more_than=1)) == (pytest.approx(2 / 3), 1.0)
    assert union_coverage(matrix) == 1.0
    assert union_coverage(matrix, more_than=1) == pytest.approx(2 / 3)


def test_samples_without_a_verdict() -> None:
    outcomes = np.array([[[1, -1, -1, -1], [1, 0, -1, 0]]], np.int8)
    matrix = CorrectMatrix(np.array([1.0]), outcomes)
    assert precision(matrix).tolist() == [[1.0, 1 / 3]]
    assert coverage(matrix, more_than=1).tolist() == [0.0]
    assert pass_at_k_curve(matrix, 1)[0] == pytest.approx(2 / 3)
    with pytest.raises(ConfigError, match=r"k: got 2, expected at most the 1 scored samples"):
        pass_at_k_curve(matrix, 2)
    nothing = CorrectMatrix(np.array([1.0]), np.array([[[1, 1], [-1, -1]]], np.int8))
    with pytest.raises(ConfigError, match=r"matrix: got 1 problems without a scored sample"):
        precision(nothing)


def test_chance_hits_are_binomial() -> None:
    assert chance_coverage(0.001, 128) == pytest.approx(0.120203, abs=1e-6)
    assert chance_coverage(0.001, 128, more_than=2) == pytest.approx(0.000311, abs=1e-6)
    assert (chance_coverage(0, 5), chance_coverage(1, 5, more_than=4), chance_coverage(0.5, 5, more_than=5)) == (
        0.0,
        1.0,
        0.0,
    )
    hits = (np.random.default_rng(0).random((1, 20_000, 128)) < 0.001).astype(np.int8)
    matrix = CorrectMatrix(np.array([1.0]), hits)
    assert coverage(matrix)[0] == pytest.approx(0.120203, abs=3 * math.sqrt(0.1202 * 0.8798 / 20_000))
    assert coverage(matrix, more_than=2)[0] < 0.001


def test_the_best_is_biased_and_the_held_out_best_is_not() -> None:
    """All temperatures are equally good; choosing the luckiest makes it look better, unless others score it."""
    rng, best, held_out = np.random.default_rng(0), [], []
    for _ in range(200):
        draws: NDArray[np.int8] = (rng.random((8, 20, 8)) < 0.3).astype(np.int8)
        matrix = CorrectMatrix(np.arange(1.0, 9), draws)
        best.append(best_over_temperature(matrix).value)
        held_out.append(held_out_best(matrix))
    error = 3 * float(np.std(held_out)) / math.sqrt(200)
    assert np.mean(held_out) == pytest.approx(0.3, abs=error)
    assert np.mean(best) > 0.3 + 2 * error


def test_numbers_out_of_range_are_refused() -> None:
    for call, message in (
        (lambda: coverage(HAND, more_than=128), r"more_than: got 128, expected less than n = 128"),
        (lambda: coverage(HAND, more_than=-1), r"more_than: got -1"),
        (lambda: pass_at_k_curve(HAND, 0), r"k: got 0"),
        (lambda: pass_at_k_curve(HAND, 129), r"k: got 129"),
        (lambda: chance_coverage(1.5, 3), r"p: got 1.5"),
        (lambda: chance_coverage(0.5, 0), r"n: got 0"),
        (lambda: held_out_best(from_counts([[1]], 1)), r"n: got 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
