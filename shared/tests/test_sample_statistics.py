"""Hits among k of n samples, against exact fractions and against all subsets."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from effml_shared.errors import ConfigError
from effml_shared.sample_statistics import hits_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_it_is_the_share_of_subsets(n):
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        for least in range(1, k + 1):
            shares = [sum(sum(i < c for i in s) >= least for s in subsets) / len(subsets) for c in range(n + 1)]
            assert hits_at_k(n, range(n + 1), k, least) == pytest.approx(shares, abs=1e-15)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [(5, 2, 2, 0.7), (64, 1, 32, 0.5), (64, 63, 2, 1.0), (128, 3, 16, 0.332349), (10000, 10, 1000, 0.651496)],
)
def test_one_is_pass_at_k_to_the_last_bit(n, c, k, expected):
    assert hits_at_k(n, c, k) == float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))
    assert hits_at_k(n, c, k) == pytest.approx(expected, abs=1e-6)


def test_all_is_the_chance_that_every_one_is_right():
    assert hits_at_k(16, [3], 2, at_least=2).tolist() == [0.025]
    assert hits_at_k(16, [3, 16], 4, at_least=4).tolist() == [0.0, 1.0]


def test_what_can_hardly_miss_or_hit_keeps_its_digits():
    assert hits_at_k(1000, 1, 1) == 1e-3
    assert hits_at_k(2000, 1000, 1000, at_least=1000) == 1 / math.comb(2000, 1000)
    assert hits_at_k(10**6, 1, 10) == 1e-5


def test_shapes():
    assert hits_at_k([4, 6], np.array([1, 6], np.int8), 2).tolist() == [0.5, 1.0]
    assert hits_at_k(4, [[1, 2], [3, 4]], 4).tolist() == [[1, 1], [1, 1]]
    assert hits_at_k(4, np.array([], np.int64), 2).shape == (0,)
    assert hits_at_k(4, 2, 1).shape == ()


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, [1], 5, r"^n, correct, k: got 4, 1, 5, expected 0 <= correct <= n and k <= n$"),
        (4, [5], 2, r"got 4, 5, 2"),
        (4, [-1], 2, r"got 4, -1, 2"),
        (0, [0], 1, r"got 0, 0, 1"),
        (4, [0.5], 2, r"n, correct: got .* float64"),
        (4.0, [2], 2, r"n, correct: got float64"),
        ([4, 4], [1], 2, r"n, correct: got int64 \(2,\)"),
        (4, [True], 2, r"n, correct: got .* bool"),
        (4, [1], 0, r"^k: got 0"),
        (4, [1], 1.5, r"^k: got 1\.5"),
    ],
)
def test_bad_counts_are_named(n, c, k, message):
    with pytest.raises(ConfigError, match=message):
        hits_at_k(n, c, k)
