"""Is one model better than another on the same questions?

Two models find the same questions hard, so the difference per question varies less than either score: all tests work
on d_q = a_q - b_q, never on whether two marginal intervals overlap.

- t: mean(d) / SE_d against Student's t with Q - 1 degrees of freedom (clusters: G - 1).
- McNemar: 0/1 scores, questions where exactly one is right; exact binomial, or its mid-p, which is less conservative.
- sign flips: under the null every d_q might as well be -d_q; all 2^m signs of m non-zero differences if m <= 20.
- bootstrap: how often a resampled mean strays from the mean of d as far as that is from 0.
- Holm: p-values of a family of tests, valid whatever their dependence.

With weights w_q, the same for both models (bytes, say), d_q are differences of sums, and the tests are of the ratio
sum d / sum w: of bits per byte, where the two models' bits and the text's bytes are known per document.

Cost: O(Q); sign flips 2^m or draws * m, bootstrap resamples * Q.
Source: arXiv 2411.00640 for pairing; the tests are textbook. That a clustered t has G - 1 degrees of freedom and the
factor G / (G - 1), which makes it the plain one for clusters of one, is our own choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.seeding import derive_seed
from numpy.typing import ArrayLike
from scipy import special

from effml_eval.statistics.bootstrap import resampled_ratios
from effml_eval.statistics.estimate import Estimate
from effml_eval.statistics.intervals import standard_error
from effml_eval.statistics.scores import Clusters, Vector, check_level, cluster_sums, score_vector, weight_vector

__all__ = ["bootstrap_test", "holm", "mcnemar", "paired_difference", "paired_t_test", "permutation_test"]

_EXACT = 20  # non-zero differences up to which all sign patterns are counted
_BLOCK = 1 << 20  # random signs held at once


def paired_difference(
    differences: ArrayLike,
    clusters: Clusters | None = None,
    *,
    weights: ArrayLike | None = None,
    level: float = 0.95,
) -> Estimate:
    """Estimate the mean, or the ratio to weights, of paired differences (questions,) with Student's t.

    >>> print(paired_difference([0.1, 0.3, 0.2, 0.2]))
    0.2000 ± 0.0408 [0.0701, 0.3299]
    """
    check_level(level)
    d = score_vector("differences", differences)
    value = float(d.sum() / weight_vector("weights", weights, len(d)).sum())
    stderr = standard_error(d, clusters, weights=weights, cluster_correction=True)
    freedom = len(cluster_sums(d, clusters)) - 1
    quantile = float(special.stdtrit(max(freedom, 1), 0.5 + level / 2))
    return Estimate.symmetric(value, stderr, quantile, len(d), "t" if clusters is None else "t, clustered")


def paired_t_test(
    differences: ArrayLike, clusters: Clusters | None = None, *, weights: ArrayLike | None = None
) -> float:
    """Return the two-sided p-value of a mean difference, or ratio, of 0.

    Raises:
        ConfigError: fewer than two questions or clusters.

    >>> round(paired_t_test([0.1, 0.3, 0.2, 0.2]), 4)
    0.0163
    """
    d = score_vector("differences", differences)
    freedom = len(_units(d, clusters)) - 1
    difference = paired_difference(d, clusters, weights=weights)
    if difference.stderr == 0:
        return 1.0 if difference.value == 0 else 0.0
    return float(2 * special.stdtr(freedom, -abs(difference.value / difference.stderr)))


def mcnemar(only_first: int, only_second: int, *, mid_p: bool = False) -> float:
    """Return McNemar's two-sided exact p-value.

    Args:
        only_first: questions that only the first model has right.
        only_second: questions that only the second has right.
        mid_p: count half of what is as probable as the observation.

    >>> round(mcnemar(2, 9), 7), round(mcnemar(2, 9, mid_p=True), 7)
    (0.0654297, 0.0385742)
    """
    check_count("only_first", only_first, 0)
    check_count("only_second", only_second, 0)
    n, fewer = only_first + only_second, min(only_first, only_second)
    tail = float(special.bdtr(fewer, n, 0.5))
    beyond = float(special.bdtr(fewer - 1, n, 0.5)) if fewer else 0.0
    return min(1.0, tail + (beyond if mid_p else tail))


def permutation_test(
    differences: ArrayLike, clusters: Clusters | None = None, *, draws: int = 100_000, seed: int = 0
) -> float:
    """Return the two-sided p-value of the sum of differences under random signs.

    The share of sign patterns, the observed one included, whose sum is at least as far from 0; of all of them with up
    to 20 non-zero differences (cluster sums), else (1 + hits) / (1 + draws) of random ones.

    >>> permutation_test([1, 1, 0, -1, 1])
    0.625
    """
    check_count("draws", draws, 1)
    d = _units(score_vector("differences", differences), clusters)
    d = d[d != 0]
    # sums that are equal on paper differ by rounding
    observed = abs(d.sum()) - 1e-12 * np.abs(d).sum()
    if len(d) <= _EXACT:
        sums = np.zeros(1)
        for each in d:
            sums = np.concatenate([sums + each, sums - each])
        return float((np.abs(sums) >= observed).mean())
    generator = np.random.Generator(np.random.Philox(key=derive_seed(seed, "sign flips")))
    width = -(-len(d) // 8)  # bytes that hold one pattern
    rows = max(1, _BLOCK // len(d))
    hits = 0
    for start in range(0, draws, rows):
        packed = generator.integers(256, size=(min(rows, draws - start), width), dtype=np.uint8)
        flips = np.unpackbits(packed, axis=1, count=len(d)).astype(np.float64)
        hits += int((np.abs(d.sum() - 2 * (flips @ d)) >= observed).sum())
    return (1 + hits) / (1 + draws)


def bootstrap_test(
    differences: ArrayLike,
    clusters: Clusters | None = None,
    *,
    weights: ArrayLike | None = None,
    resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Return the two-sided p-value of a mean difference, or ratio, of 0, from resamples moved to 0.

    Slightly liberal for few questions (30: about 6% rejections at 5%), where the t-test and sign flips are not.

    >>> bootstrap_test([1.0, 1.0, 0.5, 1.5], resamples=999)
    0.001
    """
    d = score_vector("differences", differences)
    w = weight_vector("weights", weights, len(d))
    _units(d, clusters)
    value, scale = d.sum() / w.sum(), np.abs(d).sum() / w.sum()
    strays = np.abs(resampled_ratios(d, w, clusters=clusters, resamples=resamples, seed=seed) - value)
    return (1 + int((strays >= abs(value) - 1e-12 * scale).sum())) / (1 + resamples)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for testing all of them (Holm), in the order given.

    >>> [round(p, 6) for p in holm([0.01, 0.04, 0.03, 0.005])]
    [0.03, 0.06, 0.06, 0.02]
    """
    p = score_vector("p_values", p_values)
    if not ((p >= 0) & (p <= 1)).all():
        raise ConfigError(f"p_values: got {list(p_values)}, expected numbers between 0 and 1")
    order = np.argsort(p, kind="stable")
    steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, steps)
    return [float(each) for each in adjusted]


def _units(d: Vector, clusters: Clusters | None) -> Vector:
    """Return the difference of every independent unit, of which a test needs two."""
    units = cluster_sums(d, clusters)
    if len(units) < 2:
        raise ConfigError(f"differences: got {len(units)} independent question or cluster, expected at least two")
    return units
