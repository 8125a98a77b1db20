"""Standard errors and confidence intervals of a mean, or a ratio of sums, over questions.

    SE = s / sqrt(Q)                                                    s with Q - 1
    SE = sqrt(sum_g (sum_{q in g} (y_q - ybar))^2) / Q                  questions in clusters g

and of a ratio of sums r = sum y / sum w by the same, with y_q - r w_q for the residual and sum w for Q (delta method).
The clustered form is asymptotic in the number of clusters G; the factor sqrt(G / (G - 1)), off by default, makes it the
first one where every question is its own cluster. Wilson's interval inverts the score test of a proportion: it stays
inside [0, 1] and covers near 0 and 1, where the normal interval does not.

Cost: O(Q). Source: arXiv 2411.00640.
"""

from __future__ import annotations

import math

import numpy as np
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from numpy.typing import ArrayLike
from scipy import special

from effml_eval.statistics.bootstrap import bootstrap_ci
from effml_eval.statistics.estimate import Estimate
from effml_eval.statistics.scores import Clusters, check_level, cluster_sums, score_vector, weight_vector

__all__ = ["mean_estimate", "standard_error", "wilson_interval"]


def standard_error(
    scores: ArrayLike,
    clusters: Clusters | None = None,
    *,
    weights: ArrayLike | None = None,
    cluster_correction: bool = False,
) -> float:
    """Return the standard error of the mean of scores (questions,), NaN for a single question or cluster.

    Args:
        clusters: one label per question, where questions are not independent.
        weights: (questions,), positive: of the ratio sum of scores / sum of weights in place of the mean.
        cluster_correction: multiply the clustered form by sqrt(G / (G - 1)) for G clusters.

    >>> round(standard_error([1] * 7 + [0] * 3), 6)
    0.152753
    >>> round(standard_error([1, 1, 0, 0, 1, 0], clusters=[0, 0, 1, 1, 2, 2]), 6)
    0.235702
    """
    y = score_vector("scores", scores)
    w = weight_vector("weights", weights, len(y))
    sums = cluster_sums(y - y.sum() / w.sum() * w, clusters)
    units = len(sums)
    if units < 2:
        return math.nan
    corrected = clusters is None or cluster_correction
    return float(np.linalg.norm(sums) / w.sum()) * (math.sqrt(units / (units - 1)) if corrected else 1.0)


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a proportion.

    Raises:
        ConfigError: not 0 <= successes <= n, or n = 0.

    >>> low, high = wilson_interval(8, 10)
    >>> round(low, 6), round(high, 6)
    (0.490162, 0.943318)
    """
    check_count("n", n, 1)
    check_count("successes", successes, 0)
    if successes > n:
        raise ConfigError(f"successes: got {successes}, expected at most n = {n}")
    check_level(level)
    z = float(special.ndtri(0.5 + level / 2))
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    # at 0 and n one end is exact, and must not miss it by rounding
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def mean_estimate(
    scores: ArrayLike,
    *,
    clusters: Clusters | None = None,
    ci: str = "normal",
    level: float = 0.95,
    cluster_correction: bool = False,
    resamples: int = 10_000,
    seed: int = 0,
) -> Estimate:
    """Estimate the mean of scores (questions,).

    Args:
        scores: one per question; a question with several samples counts with their mean.
        clusters: one label per question, where questions are not independent.
        ci: `"normal"`, `"wilson"` (0/1 scores without clusters), `"bootstrap"` (percentile) or `"bca"`.
        level: of the interval.
        cluster_correction: see `standard_error`; recorded in the method.
        resamples: of a bootstrap.
        seed: of a bootstrap.

    Raises:
        ConfigError: no or not finite scores, or Wilson's interval for what it does not hold for.

    >>> print(mean_estimate([1] * 7 + [0] * 3))
    0.7000 ± 0.1528 [0.4006, 0.9994]
    """
    check_choice("ci", ci, ("normal", "wilson", "bootstrap", "bca"))
    check_level(level)
    y = score_vector("scores", scores)
    if ci in ("bootstrap", "bca"):
        method = "percentile" if ci == "bootstrap" else "bca"
        return bootstrap_ci(y, clusters=clusters, method=method, resamples=resamples, seed=seed, level=level)
    value, stderr = float(y.mean()), standard_error(y, clusters, cluster_correction=cluster_correction)
    if ci == "wilson":
        if clusters is not None:
            raise ConfigError("ci: got 'wilson' with clusters, expected 'normal', 'bootstrap' or 'bca'")
        if not ((y == 0) | (y == 1)).all():
            raise ConfigError("ci: got 'wilson' for scores between 0 and 1, expected 0/1 scores")
        return Estimate(value, stderr, *wilson_interval(int(y.sum()), len(y), level), len(y), "wilson")
    method = "normal" if clusters is None else "normal, clustered"
    if clusters is not None and cluster_correction:
        method += " with G/(G-1)"
    return Estimate.symmetric(value, stderr, float(special.ndtri(0.5 + level / 2)), len(y), method)
