"""Bootstrap intervals of means and of ratios of sums, over questions or over clusters of them.

A unit u has a numerator a_u and a denominator b_u; the statistic is f(sum a / sum b), f being monotone. A mean has
b = 1; perplexity is exp(sum of negative log-likelihoods / sum of tokens), its units documents. A cluster is one unit
with its sums: a mean over clustered questions is a ratio too.

Percentile interval: quantiles of the resampled statistic. BCa shifts them for bias (z0, from the share of resamples
below the estimate) and for a standard error that changes with the value (a, from the jackknife).

Cost: O(resamples * units) time, in blocks of about a million draws; the jackknife is O(units), since leaving a unit out
of a ratio of sums takes two subtractions. Draws come from a counter-based generator in one order, so that the result
depends on the seed alone and not on the size of a block.

Source: B. Efron, "Better bootstrap confidence intervals", JASA 1987; arXiv 2411.00640 on when not to bother.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from effml_shared.checks import check_choice, check_count
from effml_shared.seeding import derive_seed
from numpy.typing import ArrayLike
from scipy import special

from effml_eval.statistics.estimate import Estimate
from effml_eval.statistics.scores import Clusters, Vector, check_level, cluster_sums, score_vector, weight_vector

__all__ = ["bootstrap_ci", "resampled_ratios"]

_BLOCK = 1 << 20  # draws held at once


def bootstrap_ci(
    numerators: ArrayLike,
    denominators: ArrayLike | None = None,
    *,
    transform: Callable[[Vector], Vector] | None = None,
    clusters: Clusters | None = None,
    method: str = "percentile",
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Estimate a mean, or a ratio of sums, with a bootstrap interval.

    Args:
        numerators: (questions,), the scores themselves if it is a mean.
        denominators: (questions,), positive; None for a mean.
        transform: monotone function of the ratio, element by element, such as `np.exp`.
        clusters: one label per question; whole clusters are resampled.
        method: `"percentile"` or `"bca"`.
        level: of the interval.
        resamples: how many.
        seed: the result depends on it and on the data alone.

    Raises:
        ConfigError: lengths differ, a number is not finite, or a denominator is not positive.

    >>> estimate = bootstrap_ci([-2.0, -3.0], [1, 9], transform=lambda r: np.exp(-r))
    >>> round(estimate.value, 6)
    1.648721
    """
    check_choice("method", method, ("percentile", "bca"))
    check_level(level)
    above, below = _units(numerators, denominators, clusters)
    shape = transform if transform is not None else _identity
    value = float(shape(np.array([above.sum() / below.sum()]))[0])
    n = np.size(numerators)
    name = f"bootstrap {method}" + (", clustered" if clusters is not None else "")
    check_count("resamples", resamples, 2)
    if len(above) < 2:
        return Estimate.symmetric(value, math.nan, 1.0, n, name)
    draws = shape(_draw(above, below, resamples, seed))
    shares = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        left_out = shape((above.sum() - above) / (below.sum() - below))
        shares = _bca_shares(draws, value, left_out, shares)
    low, high = np.quantile(draws, shares)
    return Estimate(value, float(draws.std(ddof=1)), float(low), float(high), n, name)


def resampled_ratios(
    numerators: ArrayLike,
    denominators: ArrayLike | None = None,
    *,
    clusters: Clusters | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> Vector:
    """Return the mean, or ratio of sums, of each resample (resamples,).

    >>> resampled_ratios([0.5, 0.5], resamples=3)
    array([0.5, 0.5, 0.5])
    """
    check_count("resamples", resamples, 1)
    return _draw(*_units(numerators, denominators, clusters), resamples, seed)


def _identity(ratio: Vector) -> Vector:
    return ratio


def _units(numerators: ArrayLike, denominators: ArrayLike | None, clusters: Clusters | None) -> tuple[Vector, Vector]:
    """Return numerator and denominator of every independent unit."""
    above = score_vector("numerators", numerators)
    below = weight_vector("denominators", denominators, len(above))
    return cluster_sums(above, clusters), cluster_sums(below, clusters)


def _draw(above: Vector, below: Vector, resamples: int, seed: int) -> Vector:
    units = len(above)
    generator = np.random.Generator(np.random.Philox(key=derive_seed(seed, "bootstrap")))
    rows = max(1, _BLOCK // units)
    equal = bool((below == below[0]).all())  # as for a mean: saves half of the gathers
    blocks = []
    for start in range(0, resamples, rows):
        picks = generator.integers(units, size=(min(rows, resamples - start), units))
        blocks.append(above[picks].sum(1) / (units * below[0] if equal else below[picks].sum(1)))
    return np.concatenate(blocks)


def _bca_shares(draws: Vector, value: float, left_out: Vector, shares: Vector) -> Vector:
    """Return the shares of the resamples below which the ends of the interval lie."""
    smaller = float((draws < value).mean() + (draws == value).mean() / 2)
    smaller = min(max(smaller, 0.5 / len(draws)), 1 - 0.5 / len(draws))
    bias = special.ndtri(smaller)
    pull = left_out.mean() - left_out
    spread = float((pull**2).sum())
    acceleration = float((pull**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    z = bias + special.ndtri(shares)
    return np.asarray(special.ndtr(bias + z / (1 - acceleration * z)))
