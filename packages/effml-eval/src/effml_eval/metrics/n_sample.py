"""What k of n samples of a problem would have achieved: unbiased estimates of best, worst and chosen.

With c of n samples correct, the number of correct ones in a random k-subset is hypergeometric, and

    pass@k       = P(at least 1)                          = 1 - C(n-c, k) / C(n, k)
    pass^k       = P(all k)                               = C(c, k) / C(n, k)
    G-Pass@k_tau = P(at least max(1, ceil(tau k)))
    rm@k         = sum_i C(n-i, k-1) / C(n, k) correct_i  samples by descending score, i = 1..n

rm@k is how often the highest-scored of k is correct; samples of equal score share the mean of their block, as a random
choice among them would. pass@k is never 1 - (1 - c/n)^k, which is biased, and k > n has no estimate.

Cost: O(k) products of integers per distinct (n, c), exact up to the one division.
Source: pass@k arXiv 2107.03374, section 2.1; G-Pass@k arXiv 2412.13147; pass^k
arXiv 2406.12045.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.sample_statistics import hits_at_k
from numpy.typing import ArrayLike, NDArray

__all__ = ["g_pass_at_k", "pass_all_at_k", "pass_at_k", "rm_at_k"]


def pass_at_k(n: ArrayLike, correct: ArrayLike, k: int) -> NDArray[np.float64]:
    """Return the probability that at least one of k samples is correct, per problem, shape of `correct`.

    Args:
        n: samples, of all problems or per problem.
        correct: how many of them are correct, integers.
        k: at most the smallest n.

    Raises:
        ConfigError: k > n, or not 0 <= correct <= n.

    >>> pass_at_k(16, [0, 3, 16], k=4).round(7).tolist()
    [0.0, 0.6071429, 1.0]
    """
    return hits_at_k(n, correct, k)


def pass_all_at_k(n: ArrayLike, correct: ArrayLike, k: int) -> NDArray[np.float64]:
    """Return the probability that all of k samples are correct (pass^k), per problem.

    >>> pass_all_at_k(16, [3], k=2).tolist()
    [0.025]
    """
    return hits_at_k(n, correct, k, at_least=k)


def g_pass_at_k(n: ArrayLike, correct: ArrayLike, k: int, tau: float) -> NDArray[np.float64]:
    """Return the probability that at least the share tau of k samples, and at least one, is correct, per problem.

    Raises:
        ConfigError: as `pass_at_k`, or tau is not in [0, 1].

    >>> g_pass_at_k(16, [10], k=8, tau=0.5).round(7).tolist()
    [0.9405594]
    """
    if not 0 <= tau <= 1:
        raise ConfigError(f"tau: got {tau}, expected a share in [0, 1]")
    check_count("k", k, 1)
    return hits_at_k(n, correct, k, max(1, math.ceil(tau * k - 1e-9)))  # 0.1 * 30 is more than 3 in floats


def rm_at_k(scores: ArrayLike, correct: ArrayLike, k: int) -> float:
    """Return the probability that the highest-scored of k samples of one problem is correct.

    Args:
        scores: (n,), of a reward model or the like; equal scores are broken at random.
        correct: (n,), 0 or 1, or any score in its place.
        k: at most n.

    Raises:
        ConfigError: k > n, different lengths, or NaN.

    >>> rm_at_k([4, 3, 2, 1], [0, 1, 1, 0], k=2)
    0.5
    """
    check_count("k", k, 1)
    ranks, hits = np.asarray(scores, np.float64), np.asarray(correct, np.float64)
    if ranks.ndim != 1 or ranks.shape != hits.shape:
        raise ConfigError(f"scores, correct: got {ranks.shape} and {hits.shape}, expected both (samples,)")
    if np.isnan(ranks).any() or np.isnan(hits).any():
        raise ConfigError("scores, correct: got NaN, expected numbers")
    n = len(ranks)
    if k > n:
        raise ConfigError(f"k: got {k}, expected at most the number of samples, {n}")
    # blocks of equal score, the highest first; each sample counts with its block's mean
    _, block = np.unique(-ranks, return_inverse=True)
    means = np.bincount(block, weights=hits) / np.bincount(block)
    return float(_best_of_weights(n, k) @ means[np.sort(block)])


@lru_cache(maxsize=64)
def _best_of_weights(n: int, k: int) -> NDArray[np.float64]:
    """Return the probability that the i-th best of n is the best of k, (n,)."""
    subsets = math.comb(n, k)
    return np.array([math.comb(n - i, k - 1) / subsets for i in range(1, n + 1)])
