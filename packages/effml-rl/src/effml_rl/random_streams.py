"""One stream of uniform numbers per row, of which any number is computed at once from the row's key and its index.

Number t of a stream with key k is the t-th output of SplitMix64 started at k (Steele, Lea, Flood, 2014): a counter and
a hash of it, with no state. A key comes from sha256 of (seed, draw, the prompt's tokens) and the sample's number alone,
so a row meets the same numbers in any batch, and at any temperature: differences between temperatures, or between two
policies, are then not blurred by different luck. Cost: some ten 64-bit operations per number, all rows at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from effml_shared.seeding import derive_seed
from numpy.typing import NDArray

__all__ = ["stream_keys", "uniforms"]

_STEP = np.uint64(0x9E3779B97F4A7C15)


def stream_keys(seed: int, draw: int, prompt: Sequence[int], samples: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the keys of the samples with these numbers, of that shape."""
    root = np.uint64(derive_seed(seed, "sampler", draw, *prompt))
    return _mixed(root + (samples.astype(np.uint64) + np.uint64(1)) * _STEP)


def uniforms(keys: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Return the first `count` numbers of every stream, (rows, count), multiples of 2^-52 in [0, 1).

    >>> keys = stream_keys(0, 0, [5, 6], np.arange(3))
    >>> bool((uniforms(keys, 4)[2] == uniforms(keys[2:], 9)[0, :4]).all())
    True
    """
    counters = keys[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _STEP
    return (_mixed(counters) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return SplitMix64's hash; products and sums are modulo 2^64."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
