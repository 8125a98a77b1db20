"""Trivial distillation: what a model with larger logits, and nothing learned, would show. A control for every claim.

Logits multiplied by k at temperature T are the same distribution as the model's own at T / k. So precision becomes less
sensitive to temperature, with no change whatever in what the model can solve:

    P1_k(T) = P1(T / k)          exactly, and Cov* is unchanged if the scaled model is read on the grid k T

On the *same* grid Cov* does change, as the best temperature has moved. `fit_scaling` finds the k that explains a
trained model's accuracy best; what is left of its gain beyond that is not trivial.

Source: our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from effml_shared.errors import ConfigError
from numpy.typing import NDArray

from effml_rl.wall.correct_matrix import CorrectMatrix, check_paired
from effml_rl.wall.temperature_curves import accuracy

__all__ = ["ScalingFit", "fit_scaling", "scale_logits"]

_LARGEST = 64.0  # factor looked for, and 1 / _LARGEST
_FACTORS = 2401  # 0.35% apart


@dataclass(frozen=True, eq=False)
class ScalingFit:
    """The scaling of the logits that explains most of an accuracy curve."""

    factor: float
    explained: NDArray[np.float64]  # (temperatures,): accuracy of the scaled model on the grid of the trained one
    residual: NDArray[np.float64]  # (temperatures,): what the trained model has beyond that


def scale_logits(matrix: CorrectMatrix, factor: float) -> CorrectMatrix:
    """Return the matrix of a model with `factor` times the logits, which has the same samples on a scaled grid.

    Raises:
        ConfigError: the factor is not a finite number above 0.

    >>> matrix = CorrectMatrix(np.array([0.25, 1.0]), np.ones((2, 1, 1), np.int8))
    >>> scale_logits(matrix, 4.0).temperatures.tolist()
    [1.0, 4.0]
    """
    if not 0 < factor < math.inf:
        raise ConfigError(f"factor: got {factor}, expected a finite number above 0")
    return CorrectMatrix(matrix.temperatures * factor, matrix.outcomes, matrix.greedy, matrix.problems)


def fit_scaling(before: CorrectMatrix, after: CorrectMatrix) -> ScalingFit:
    """Find the factor whose scaled model has the accuracy curve nearest to that of the trained one.

    Nearest is least squares over the trained model's grid; of factors that are equally near, the one nearest to 1 is
    taken. Between temperatures accuracy is linear in log T; beyond the grid it is that of its end, which is right
    towards 0, where sampling becomes greedy, and too high towards infinity.

    Raises:
        ConfigError: problems or samples per problem differ.
    """
    check_paired(before, after)
    old, new = accuracy(before), accuracy(after)
    factors = np.geomspace(1 / _LARGEST, _LARGEST, _FACTORS)
    factors = factors[np.argsort(np.abs(np.log(factors)), kind="stable")]
    factors[0] = 1.0  # the middle of the range, free of rounding
    wanted = np.log(after.temperatures) - np.log(factors)[:, None]
    curves = np.interp(wanted, np.log(before.temperatures), old)
    errors = ((curves - new) ** 2).sum(1)
    at = int(np.flatnonzero(errors <= errors.min() + 1e-12)[0])
    return ScalingFit(float(factors[at]), curves[at], new - curves[at])
