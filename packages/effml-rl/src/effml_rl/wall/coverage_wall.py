"""The coverage wall: did training make new problems solvable, or only solve the old ones more often?

    Delta Cov* = max_T Cov_after(T) - max_T Cov_before(T),     and Delta P1* likewise

with percentile bootstrap intervals over problems: both matrices are resampled by the same problems, and the maximum
over temperatures is taken anew in every resample. Training hits the wall if precision grew and coverage did not:
Delta P1* > 0, and the interval of Delta Cov* holds 0 or Delta Cov* < 0.01.

Resampling N problems with replacement only weighs them, so B resamples are one product (B, N) @ (N, temperatures).

Source: arXiv 2505.22756 has coverage and the wall; the test is our own. Coverage is an extreme statistic, and its best
over temperatures is biased upward on both sides: fix a temperature for an unbiased difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.seeding import derive_seed
from numpy.typing import NDArray

from effml_rl.wall.correct_matrix import CorrectMatrix, check_paired
from effml_rl.wall.temperature_curves import covered, precision

__all__ = ["Change", "WallTest", "problems_needed", "wall_test"]

_NEGLIGIBLE = 0.01  # coverage that is no gain worth the name


@dataclass(frozen=True)
class Change:
    """A mean over problems before and after, and a bootstrap interval of the difference."""

    before: float
    after: float
    low: float
    high: float

    @property
    def delta(self) -> float:
        return self.after - self.before


@dataclass(frozen=True)
class WallTest:
    """Changes of coverage and of precision, each at its own best temperature."""

    coverage: Change
    precision: Change

    @property
    def hits_wall(self) -> bool:
        """Whether precision grew and coverage did not."""
        stands = self.coverage.low <= 0 <= self.coverage.high or self.coverage.delta < _NEGLIGIBLE
        return stands and self.precision.delta > 0


def wall_test(
    before: CorrectMatrix,
    after: CorrectMatrix,
    n_boot: int = 2000,
    *,
    more_than: int = 0,
    temperature: float | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> WallTest:
    """Compare matrices of the same problems before and after training.

    Args:
        n_boot: bootstrap resamples.
        more_than: a problem is covered by more than `more_than` right samples.
        temperature: None for the best over each matrix's grid.
        level: of the intervals.

    Raises:
        ConfigError: problems or samples per problem differ, a temperature is not on both grids, or a number is out of
            range.
    """
    check_paired(before, after)
    check_count("n_boot", n_boot, 1)
    if not 0 < level < 1:
        raise ConfigError(f"level: got {level}, expected a probability between 0 and 1")
    rng = np.random.default_rng(derive_seed(seed, "wall test"))
    weights = rng.multinomial(before.n_problems, np.full(before.n_problems, 1 / before.n_problems), n_boot)

    def change(values: Callable[[CorrectMatrix], NDArray[np.float64]]) -> Change:
        best = []
        for matrix in (before, after):
            rows = slice(None) if temperature is None else [matrix.index(temperature)]
            chosen = values(matrix)[rows]
            best.append((chosen.mean(1).max(), (weights @ chosen.T).max(1) / before.n_problems))
        (old, resampled_old), (new, resampled_new) = best
        low, high = np.quantile(resampled_new - resampled_old, [(1 - level) / 2, (1 + level) / 2])
        return Change(float(old), float(new), float(low), float(high))

    return WallTest(change(lambda matrix: covered(matrix, more_than).astype(np.float64)), change(precision))


def problems_needed(
    before: CorrectMatrix, after: CorrectMatrix, temperature: float, effect: float = 0.02, *, power: float = 0.8
) -> int:
    """Return how many problems show a change of coverage at one temperature, by a two-sided paired z-test at 5%.

    The variance of the paired difference is taken from the matrices, which may be of a pilot study.

    Args:
        effect: change of coverage to be detected, such as 0.02 for two points.
        power: probability to detect it.

    Raises:
        ConfigError: problems or n differ, the temperature is not on both grids, or a number is out of range.
    """
    check_paired(before, after)
    if not 0 < effect <= 1 or not 0 < power < 1:
        raise ConfigError(f"effect, power: got {effect}, {power}, expected 0 < effect <= 1 and 0 < power < 1")
    new, old = (covered(matrix)[matrix.index(temperature)].astype(np.float64) for matrix in (after, before))
    scale = NormalDist().inv_cdf(0.975) + NormalDist().inv_cdf(power)
    return max(2, math.ceil((scale / effect) ** 2 * float((new - old).var())))
