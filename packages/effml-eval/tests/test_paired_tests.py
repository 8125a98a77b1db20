"""Paired tests against exact numbers, scipy and enumeration, and their size under the null."""

import itertools
import math

import numpy as np
import pytest
from effml_eval.statistics.paired_tests import (
    bootstrap_test,
    holm,
    mcnemar,
    paired_difference,
    paired_t_test,
    permutation_test,
)
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

p_values = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_t_test_and_interval_are_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=30), rng.normal(0.3, size=30)
    reference = stats.ttest_rel(a, b)
    assert paired_t_test(a - b) == pytest.approx(reference.pvalue, rel=1e-10)
    assert paired_t_test(b - a) == paired_t_test(a - b)
    estimate, interval = paired_difference(a - b, level=0.9), reference.confidence_interval(0.9)
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx((interval.low, interval.high), rel=1e-10)
    assert paired_t_test(a - b, clusters=range(30)) == pytest.approx(reference.pvalue, rel=1e-10)


def test_clusters_of_the_t_test_count_degrees_of_freedom():
    d, labels = [0.5, 0.3, 0.1, -0.1, 0.2, 0.4], ["a", "a", "b", "b", "c", "c"]
    means = [0.4, 0.0, 0.3]
    assert paired_t_test(d, labels) == pytest.approx(stats.ttest_1samp(means, 0).pvalue, rel=1e-10)


def test_weights_make_it_a_ratio_of_sums():
    rng = np.random.default_rng(3)
    w = rng.integers(1, 9, 60).astype(float)
    d = w * rng.normal(0.3, 1, 60)
    estimate = paired_difference(d, weights=w)
    assert estimate.value == pytest.approx(d.sum() / w.sum())
    assert paired_t_test(d, weights=w) == pytest.approx(bootstrap_test(d, weights=w), abs=0.02)
    assert (paired_t_test(d, weights=w) < 0.05) == (estimate.ci_low > 0 or estimate.ci_high < 0)
    assert paired_t_test(d, weights=np.full(60, 3.0)) == pytest.approx(paired_t_test(d), rel=1e-9)


def test_differences_without_variance():
    assert paired_t_test([0.0, 0.0, 0.0]) == 1
    assert paired_t_test([1, 1, 1]) == 0
    assert permutation_test([0.0, 0.0]) == 1
    assert bootstrap_test([0.0, 0.0], resamples=50) == 1


def test_mcnemar():
    assert mcnemar(2, 9) == pytest.approx(0.0654297, abs=5e-8)
    assert mcnemar(2, 9, mid_p=True) == pytest.approx(0.0385742, abs=5e-8)
    assert mcnemar(0, 0) == mcnemar(0, 0, mid_p=True) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(5, 5, mid_p=True) == pytest.approx(1)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_the_binomial_test(b, c):
    p = mcnemar(b, c)
    assert p == mcnemar(c, b)
    if b + c:
        assert p == pytest.approx(stats.binomtest(b, b + c).pvalue, rel=1e-9)
        expected = p - stats.binom.pmf(min(b, c), b + c, 0.5) if b != c else 1
        assert mcnemar(b, c, mid_p=True) == pytest.approx(expected, rel=1e-9, abs=1e-15)


def naive_sign_flips(d: list[float]) -> float:
    sums = [
        abs(sum(s * x for s, x in zip(signs, d, strict=True))) for signs in itertools.product((1, -1), repeat=len(d))
    ]
    return float(np.mean([total >= abs(sum(d)) - 1e-9 for total in sums]))


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=8))
def test_all_sign_flips(d):
    assert permutation_test(d) == pytest.approx(naive_sign_flips([float(x) for x in d]))
    assert permutation_test([x / 10 for x in d]) == permutation_test(d)  # rounding breaks no tie


def test_sign_flips_of_the_example_and_their_clusters():
    assert permutation_test([1, 1, 0, -1, 1]) == 0.625
    assert permutation_test([1, 0.5, 0.5, -1, 2, -1], ["a", "a", "b", "b", "c", "c"]) == naive_sign_flips(
        [1.5, -0.5, 1]
    )


def test_random_sign_flips_agree_with_all_of_them():
    rng = np.random.default_rng(2)
    d = (rng.integers(0, 2, 400) - rng.integers(0, 2, 400)).astype(float) + (np.arange(400) < 25)
    ups, downs = int((d > 0).sum()), int((d < 0).sum())
    exact_like = permutation_test(d, draws=20_000)
    normal = 2 * stats.norm.sf((abs(d.sum()) - 0.5) / math.sqrt((d**2).sum()))
    assert ups + downs > 20
    assert exact_like == pytest.approx(normal, abs=5 * math.sqrt(normal / 20_000) + 0.002)
    assert permutation_test(d, draws=20_000) == exact_like != permutation_test(d, draws=20_000, seed=1)


def test_one_sided_differences_reach_the_smallest_p():
    assert permutation_test([1.0] * 21, draws=999) == 1 / 1000
    assert permutation_test([1.0] * 10) == 2 / 2**10


@pytest.mark.parametrize(
    ("test", "size"),
    [
        (lambda d, seed: paired_t_test(d), 0.05),
        (lambda d, seed: permutation_test(d, draws=999, seed=seed), 0.05),
        # resampled means have no Bessel factor and normal tails: P(|t_29| > 1.96 sqrt(29/30))
        (lambda d, seed: bootstrap_test(d, resamples=999, seed=seed), 0.064),
    ],
    ids=["t", "sign flips", "bootstrap"],
)
def test_size_under_the_null(test, size):
    rng = np.random.default_rng(7)
    rejected = sum(test(rng.normal(size=30), trial) <= 0.05 for trial in range(500))
    assert rejected == pytest.approx(500 * size, abs=4 * math.sqrt(500 * size))


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.4]) == [0.4]


@settings(max_examples=50)
@given(p_values)
def test_holm_lies_between_no_correction_and_bonferroni(p):
    adjusted = holm(p)
    assert all(raw <= new <= min(1.0, raw * len(p) + 1e-15) for raw, new in zip(p, adjusted, strict=True))
    order = np.argsort(p, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: paired_t_test([0.1]), "differences: got 1 independent"),
        (lambda: permutation_test([0.1, 0.2], ["a", "a"]), "differences: got 1 independent"),
        (lambda: bootstrap_test([0.1]), "differences: got 1 independent"),
        (lambda: permutation_test([0.1, 0.2], draws=0), "draws: got 0"),
        (lambda: mcnemar(-1, 2), "only_first: got -1"),
        (lambda: mcnemar(1, 2.0), "only_second: got 2.0"),
        (lambda: holm([0.1, 1.2]), "p_values: got"),
        (lambda: holm([math.nan]), "p_values: got nan"),
        (lambda: holm([]), "p_values: got shape"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
