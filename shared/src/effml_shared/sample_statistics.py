"""What k of a problem's n samples would have achieved, without bias: the hits among k drawn without replacement.

With c of n samples correct, the number X of correct ones among k of them is hypergeometric,

    P(X >= m) = sum_{j >= m} C(c, j) C(n-c, k-j) / C(n, k),        pass@k = P(X >= 1) = 1 - C(n-c, k) / C(n, k),

and its expectation over the n samples is the same probability for k fresh ones. That of 1 - (1 - c/n)^k is not.

Cost: O(min(c, k)) products of integers per distinct (n, c), exact up to the one division.
Source: pass@k arXiv 2107.03374, section 2.1.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from effml_shared.checks import check_count
from effml_shared.errors import ConfigError

__all__ = ["hits_at_k"]


def hits_at_k(n: ArrayLike, correct: ArrayLike, k: int, at_least: int = 1) -> NDArray[np.float64]:
    """Return the probability that at least so many of k samples are correct, per problem, shape of `correct`.

    Args:
        n: samples, of all problems or per problem.
        correct: how many of them are correct, integers.
        k: at most the smallest n.
        at_least: 1 is pass@k, k is pass^k.

    Raises:
        ConfigError: k > n, not 0 <= correct <= n, or something is no integer.

    >>> hits_at_k(16, [0, 3, 16], k=4).round(7).tolist()
    [0.0, 0.6071429, 1.0]
    """
    check_count("k", k, 1)
    samples, right = np.asarray(n), np.asarray(correct)
    integers = all(np.issubdtype(each.dtype, np.integer) for each in (samples, right))
    if not integers or samples.shape not in ((), right.shape):
        raise ConfigError(
            f"n, correct: got {samples.dtype} {samples.shape} and {right.dtype} {right.shape}, "
            "expected integers, n one number or one for each problem"
        )
    sizes = np.broadcast_to(samples, right.shape)
    pairs = list(zip(sizes.ravel().tolist(), right.ravel().tolist(), strict=True))
    for size, hits in pairs:
        if not 0 <= hits <= size or k > size:
            raise ConfigError(f"n, correct, k: got {size}, {hits}, {k}, expected 0 <= correct <= n and k <= n")
    values = np.array([_tail(size, hits, k, at_least) for size, hits in pairs], dtype=np.float64)
    return values.reshape(right.shape)


@lru_cache(maxsize=4096)
def _tail(n: int, c: int, k: int, least: int) -> float:
    """Return P(X >= least) for X correct ones among k drawn from n with c correct ones."""
    subsets = math.comb(n, k)
    if least == 1:
        return (subsets - math.comb(n - c, k)) / subsets
    return sum(math.comb(c, j) * math.comb(n - c, k - j) for j in range(least, min(c, k) + 1)) / subsets
