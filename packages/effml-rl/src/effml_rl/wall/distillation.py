"""Temperature distillation: after training, precision hardly depends on the sampling temperature any more.

    TS = P1(T_lo) - P1(T_hi)          temperature sensitivity
    A  = mean of P1 over the grid     area
    DI = 1 - TS_after / TS_before     distillation index, on problems solved before: 1 if training removed the slope

Source: the effect is from arXiv 2505.22756; the numbers that measure it are our own. See `logit_scaling` for how much
of it larger logits alone would give.
"""

from __future__ import annotations

import math

import numpy as np

from effml_rl.wall.correct_matrix import CorrectMatrix, check_paired
from effml_rl.wall.temperature_curves import accuracy

__all__ = ["distillation_index", "temperature_area", "temperature_sensitivity"]


def temperature_sensitivity(matrix: CorrectMatrix, low: float | None = None, high: float = 1.0) -> float:
    """Return P1(low) - P1(high).

    Args:
        low: None for the lowest temperature of the grid.

    Raises:
        ConfigError: a temperature is not on the grid.
    """
    curve = accuracy(matrix)
    return float(curve[0 if low is None else matrix.index(low)] - curve[matrix.index(high)])


def temperature_area(matrix: CorrectMatrix) -> float:
    """Return the mean of P1 over the temperatures of the grid."""
    return float(accuracy(matrix).mean())


def distillation_index(
    before: CorrectMatrix, after: CorrectMatrix, low: float | None = None, high: float = 1.0
) -> float:
    """Return the share of the temperature sensitivity that training removed, on problems that were solved before.

    Args:
        low: None for the lowest temperature of each grid.

    Returns:
        NaN where no problem was solved, or precision did not fall with temperature, before.

    Raises:
        ConfigError: the matrices are of different problems or n, or a temperature is not on both grids.
    """
    check_paired(before, after)
    solved = np.any(before.correct > 0, axis=0)
    if not solved.any():
        return math.nan
    old, new = (temperature_sensitivity(matrix.select(solved), low, high) for matrix in (before, after))
    return 1 - new / old if old > 0 else math.nan
