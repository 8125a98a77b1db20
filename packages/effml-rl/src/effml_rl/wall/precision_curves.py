"""Precision problem by problem: where training gained, not only how much.

Self-sorted curves show how many problems are always, sometimes and never solved. The paired delta shows what became
of each: a policy that only sharpens gains among problems that were sometimes solved, and nothing where precision was 0.

Source: arXiv 2505.22756, official analysis.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from effml_rl.wall.correct_matrix import CorrectMatrix, check_paired
from effml_rl.wall.temperature_curves import precision

__all__ = ["DeltaCurve", "delta_curve", "sorted_precision"]


class DeltaCurve(NamedTuple):
    """Change of precision per problem, problems in descending order of precision before; all (problems,)."""

    before: NDArray[np.float64]
    delta: NDArray[np.float64]
    error: NDArray[np.float64]  # standard error of delta, from the binomial ones of both precisions
    order: NDArray[np.int64]  # numbers of the problems


def sorted_precision(matrix: CorrectMatrix) -> NDArray[np.float64]:
    """Return precisions in descending order, each temperature sorted by itself, (temperatures, problems).

    >>> matrix = CorrectMatrix(np.array([1.0]), np.array([[[0, 0], [1, 0], [1, 1]]], np.int8))
    >>> sorted_precision(matrix).tolist()
    [[1.0, 0.5, 0.0]]
    """
    return np.sort(precision(matrix), axis=1)[:, ::-1]


def delta_curve(before: CorrectMatrix, after: CorrectMatrix, temperature: float) -> DeltaCurve:
    """Return what each problem gained at a temperature of both grids.

    Raises:
        ConfigError: problems or samples per problem differ, or the temperature is not on both grids.
    """
    check_paired(before, after)
    rows = before.index(temperature), after.index(temperature)
    old, new = (precision(matrix)[row] for matrix, row in zip((before, after), rows, strict=True))
    variance = sum(
        p * (1 - p) / matrix.scored[row] for p, matrix, row in zip((old, new), (before, after), rows, strict=True)
    )
    order = np.argsort(-old, kind="stable")
    return DeltaCurve(old[order], (new - old)[order], np.sqrt(variance)[order], order)
