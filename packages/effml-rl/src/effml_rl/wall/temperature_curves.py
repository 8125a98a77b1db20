"""Precision, coverage and pass@k against temperature.

    pi_i(T) = c_i / n                 precision of problem i: right samples among n
    P1(T)   = mean_i pi_i             accuracy
    Cov(T)  = mean_i 1[c_i > h]       coverage; h = 2 of 128 (`more_than`) discounts lucky hits ("robust")

The best over temperatures is biased upward, as the samples that choose T also score it; `held_out_best` chooses by one
half and scores by the other. Coverage over the union of temperatures has that many times more samples: never compare
it with coverage at one. Unscored samples count neither as right nor, in precision and pass@k, as drawn.

Source: arXiv 2505.22756; pass@k arXiv 2107.03374; held-out choice is our own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from numpy.typing import NDArray

from effml_rl.pass_at_k import pass_at_k
from effml_rl.wall.correct_matrix import CorrectMatrix

__all__ = [
    "Best",
    "accuracy",
    "best_over_temperature",
    "chance_coverage",
    "coverage",
    "covered",
    "held_out_best",
    "pass_at_k_curve",
    "precision",
    "union_coverage",
]

Curve = NDArray[np.float64]
"""(temperatures,)"""


class Best(NamedTuple):
    """The best value on the grid and where it is."""

    value: float
    temperature: float


def precision(matrix: CorrectMatrix) -> NDArray[np.float64]:
    """Return the share of right samples, (temperatures, problems).

    Raises:
        ConfigError: a problem has no scored sample at some temperature.
    """
    scored = matrix.scored
    if not scored.all():
        count = int((scored == 0).any(0).sum())
        raise ConfigError(f"matrix: got {count} problems without a scored sample, expected one at each temperature")
    return matrix.correct / scored


def accuracy(matrix: CorrectMatrix) -> Curve:
    """Return P1(T), the mean precision, (temperatures,).

    >>> accuracy(CorrectMatrix(np.array([1.0]), np.array([[[1, 0], [1, 1]]], np.int8))).tolist()
    [0.75]
    """
    return precision(matrix).mean(1)


def covered(matrix: CorrectMatrix, more_than: int = 0) -> NDArray[np.bool_]:
    """Return which problems have more than `more_than` right samples, (temperatures, problems)."""
    check_count("more_than", more_than, 0)
    if more_than >= matrix.n:
        raise ConfigError(f"more_than: got {more_than}, expected less than n = {matrix.n}")
    return matrix.correct > more_than


def coverage(matrix: CorrectMatrix, more_than: int = 0) -> Curve:
    """Return Cov(T), the share of problems with more than `more_than` right samples, (temperatures,)."""
    return covered(matrix, more_than).mean(1)


def union_coverage(matrix: CorrectMatrix, more_than: int = 0) -> float:
    """Return the share of problems covered at some temperature: of n samples for each, so never of n alone."""
    return float(covered(matrix, more_than).any(0).mean())


def pass_at_k_curve(matrix: CorrectMatrix, k: int) -> Curve:
    """Return the unbiased estimate of pass@k, averaged over problems, (temperatures,).

    Raises:
        ConfigError: a problem has fewer than k scored samples.
    """
    check_count("k", k, 1)
    scored = matrix.scored
    if scored.min() < k:
        raise ConfigError(f"k: got {k}, expected at most the {scored.min()} scored samples of a problem")
    return pass_at_k(torch.from_numpy(scored), torch.from_numpy(matrix.correct), k).mean(1).numpy()


def best_over_temperature(matrix: CorrectMatrix, curve: Callable[[CorrectMatrix], Curve] = accuracy) -> Best:
    """Return the highest value of a curve, and the lowest temperature that has it; biased upward.

    >>> best_over_temperature(CorrectMatrix(np.array([0.5, 1.0]), np.array([[[1, 0]], [[1, 1]]], np.int8)), coverage)
    Best(value=1.0, temperature=0.5)
    """
    values = curve(matrix)
    at = int(values.argmax())
    return Best(float(values[at]), float(matrix.temperatures[at]))


def held_out_best(matrix: CorrectMatrix, curve: Callable[[CorrectMatrix], Curve] = accuracy) -> float:
    """Return a curve's value on one half of the samples where the other half is best, averaged over both ways.

    It does not overestimate what the chosen temperature gives. Coverage is that of n // 2 samples.
    """
    first, second = (curve(half) for half in matrix.halves())
    return float((first[second.argmax()] + second[first.argmax()]) / 2)


def chance_coverage(p: float, n: int, more_than: int = 0) -> float:
    """Return the expected coverage of problems that are each solved by luck, with probability p per sample.

    >>> [round(chance_coverage(0.001, 128, m), 6) for m in (0, 2)]
    [0.120203, 0.000311]
    """
    check_count("n", n, 1)
    check_count("more_than", more_than, 0)
    if not 0 <= p <= 1:
        raise ConfigError(f"p: got {p}, expected a probability")
    return 1 - math.fsum(math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(min(more_than, n) + 1))
