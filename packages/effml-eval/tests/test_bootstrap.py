"""The bootstrap against scipy's, closed forms and coverage."""

import importlib
import math

import numpy as np
import pytest
from effml_eval.statistics.bootstrap import bootstrap_ci, resampled_ratios
from effml_shared.errors import ConfigError
from scipy import stats

bootstrap = importlib.import_module("effml_eval.statistics.bootstrap")


def skewed(size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    below = rng.integers(1, 200, size).astype(float)
    return below * rng.lognormal(0, 0.6, size), below


def test_standard_error_tends_to_the_one_without_bessels_correction():
    estimate = bootstrap_ci([1] * 7 + [0] * 3, resamples=40_000)
    assert estimate.stderr == pytest.approx(0.144914, abs=4 * 0.144914 / math.sqrt(2 * 40_000))


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_ratio_of_sums_is_scipys(method):
    above, below = skewed(40)
    ours = bootstrap_ci(above, below, method=method, resamples=20_000)
    reference = stats.bootstrap(
        (above, below),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        method="BCa" if method == "bca" else method,
        n_resamples=20_000,
        batch=2000,
        random_state=np.random.default_rng(1),  # `rng` only from SciPy 1.15 on
    )
    assert ours.value == above.sum() / below.sum()
    assert ours.stderr == pytest.approx(reference.standard_error, rel=0.03)
    width = ours.ci_high - ours.ci_low
    assert ours.ci_low == pytest.approx(reference.confidence_interval.low, abs=0.03 * width)
    assert ours.ci_high == pytest.approx(reference.confidence_interval.high, abs=0.03 * width)


def test_bca_corrections_are_scipys_given_the_same_resamples():
    above, below = skewed(25, seed=3)
    draws = resampled_ratios(above, below, resamples=999)
    value = above.sum() / below.sum()
    left_out = np.array([np.delete(above, i).sum() / np.delete(below, i).sum() for i in range(25)])
    z0 = stats.norm.ppf((draws < value).mean())
    pull = left_out.mean() - left_out
    a = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
    z = z0 + stats.norm.ppf([0.025, 0.975])
    expected = np.quantile(draws, stats.norm.cdf(z0 + z / (1 - a * z)))
    ours = bootstrap_ci(above, below, method="bca", resamples=999)
    assert (ours.ci_low, ours.ci_high) == pytest.approx(tuple(expected), rel=1e-10)


def test_seed_decides_and_the_block_does_not(monkeypatch):
    above, below = skewed(13)
    first = bootstrap_ci(above, below, resamples=500)
    assert bootstrap_ci(above, below, resamples=500) == first
    assert bootstrap_ci(above, below, resamples=500, seed=1) != first
    for block in (1, 13 * 7, 13 * 500):
        monkeypatch.setattr(bootstrap, "_BLOCK", block)
        assert bootstrap_ci(above, below, resamples=500) == first


def test_transform_moves_a_percentile_interval_along():
    above, below = skewed(30)
    plain, exp = (
        bootstrap_ci(above, below, resamples=1001),
        bootstrap_ci(above, below, transform=np.exp, resamples=1001),
    )
    assert exp.value == pytest.approx(math.exp(plain.value))
    assert exp.ci_low == pytest.approx(math.exp(plain.ci_low), rel=1e-3)
    falling = bootstrap_ci(above, below, transform=np.negative, method="bca", resamples=1001)
    assert falling.ci_low < falling.value < falling.ci_high


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_clusters_are_resampled_whole(method):
    y = [1, 1, 1, 0, 0, 0, 1, 0, 1]
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    clustered = bootstrap_ci(y, clusters=labels, method=method)
    sums = bootstrap_ci([3, 0, 2], [3, 3, 3], method=method)
    assert (clustered.value, clustered.stderr, clustered.ci_low) == (sums.value, sums.stderr, sums.ci_low)
    assert clustered.n == 9
    assert "clustered" in clustered.method


def test_unequal_clusters_keep_the_mean_over_questions():
    estimate = bootstrap_ci([1, 1, 1, 0], clusters=["a", "a", "a", "b"])
    assert estimate.value == 0.75


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_coverage(method):
    """Means of 40 exponentials; the normal approximation itself covers about 93%."""
    rng = np.random.default_rng(5)
    hits = 0
    for trial in range(300):
        estimate = bootstrap_ci(rng.exponential(size=40), method=method, resamples=500, seed=trial)
        hits += estimate.ci_low <= 1 <= estimate.ci_high
    assert 0.88 < hits / 300 < 0.98


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_constant_scores_and_single_units(method):
    constant = bootstrap_ci([0.5] * 4, method=method)
    assert (constant.stderr, constant.ci_low, constant.ci_high) == (0, 0.5, 0.5)
    single = bootstrap_ci([0.5], method=method)
    assert math.isnan(single.stderr)
    assert single.ci_high == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_ci([]), "numerators: got shape"),
        (lambda: bootstrap_ci([1, 2], [1]), "denominators: got 1, expected one for each of 2"),
        (lambda: bootstrap_ci([1, 2], [1, 0]), "denominators: got 0.0, expected positive"),
        (lambda: bootstrap_ci([1, math.nan]), "numerators: got nan at index 1"),
        (lambda: bootstrap_ci([1, 2], method="studentized"), "method: got 'studentized'"),
        (lambda: bootstrap_ci([1, 2], resamples=1), "resamples: got 1"),
        (lambda: bootstrap_ci([1, 2], clusters=[1]), "clusters: got 1 labels"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
