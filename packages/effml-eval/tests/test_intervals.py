"""Standard errors and intervals against exact numbers, scipy, and their exact coverage."""

import math

import numpy as np
import pytest
from effml_eval.statistics.bootstrap import bootstrap_ci
from effml_eval.statistics.intervals import mean_estimate, standard_error, wilson_interval
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

SEVEN = [1] * 7 + [0] * 3
scores = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30)


def test_standard_errors():
    assert standard_error(SEVEN) == pytest.approx(0.152753, abs=5e-7)
    y, pairs = [1, 1, 0, 0, 1, 0], [0, 0, 1, 1, 2, 2]
    assert standard_error(y, pairs) == pytest.approx(0.235702, abs=5e-7)
    assert standard_error(y, range(6)) == pytest.approx(0.204124, abs=5e-7)
    assert standard_error(y, pairs, cluster_correction=True) == pytest.approx(0.235702 * math.sqrt(1.5), abs=1e-6)


@given(scores)
def test_clusters_of_one_with_the_correction_are_no_clusters(y):
    plain = standard_error(y)
    assert plain == pytest.approx(float(stats.sem(y)), rel=1e-9, abs=1e-9)
    assert standard_error(y, range(len(y)), cluster_correction=True) == pytest.approx(plain, rel=1e-12)


@given(scores, st.integers(2, 5))
def test_copies_of_questions_in_a_cluster_add_no_certainty(y, copies):
    many = [value for value in y for _ in range(copies)]
    labels = [q for q in range(len(y)) for _ in range(copies)]
    assert standard_error(many, labels) == pytest.approx(standard_error(y, range(len(y))), rel=1e-9, abs=1e-9)


def test_error_of_a_ratio_is_that_of_its_resamples():
    rng = np.random.default_rng(0)
    w = rng.integers(1, 50, 200).astype(float)
    y = w * rng.lognormal(size=200)
    assert standard_error(y, weights=w) == pytest.approx(bootstrap_ci(y, w).stderr, rel=0.05)
    labels = (np.arange(200) // 4).tolist()
    assert standard_error(y, labels, weights=w) == pytest.approx(bootstrap_ci(y, w, clusters=labels).stderr, rel=0.08)
    assert standard_error(y, weights=np.full(200, 7.0)) == pytest.approx(standard_error(y) / 7)


def test_wilson_intervals():
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=5e-7)
    assert wilson_interval(0, 20) == (0.0, pytest.approx(0.161125, abs=5e-7))
    assert wilson_interval(20, 20)[1] == 1.0


@given(st.integers(1, 500), st.data(), st.floats(0.5, 0.999))
def test_wilson_is_scipys(n, data, level):
    successes = data.draw(st.integers(0, n))
    low, high = wilson_interval(successes, n, level)
    reference = stats.binomtest(successes, n).proportion_ci(level, "wilson")
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-12)
    assert 0 <= low <= successes / n <= high <= 1


def test_exact_coverage_of_wilson_and_of_the_normal_interval():
    questions, p = 50, 0.95
    covered = {"wilson": 0.0, "normal": 0.0}
    for hits in range(questions + 1):
        probability = float(stats.binom.pmf(hits, questions, p))
        for ci in covered:
            estimate = mean_estimate([1] * hits + [0] * (questions - hits), ci=ci)
            covered[ci] += probability * (estimate.ci_low <= p <= estimate.ci_high)
    assert covered["wilson"] == pytest.approx(0.9622, abs=5e-5)
    assert covered["normal"] == pytest.approx(0.9199, abs=5e-5)


def test_every_interval_of_a_mean():
    methods = {}
    for ci in ("normal", "wilson", "bootstrap", "bca"):
        estimate = mean_estimate(SEVEN, ci=ci)
        assert estimate.value == pytest.approx(0.7)
        assert estimate.ci_low < 0.7 < estimate.ci_high
        assert estimate.n == 10
        methods[ci] = estimate.method
    assert methods == {
        "normal": "normal",
        "wilson": "wilson",
        "bootstrap": "bootstrap percentile",
        "bca": "bootstrap bca",
    }
    normal = mean_estimate(SEVEN, level=0.9)
    assert normal.ci_high - normal.value == pytest.approx(1.6448536 * 0.1527525, abs=1e-6)
    assert mean_estimate(SEVEN, clusters=range(10)).method == "normal, clustered"
    assert "G/(G-1)" in mean_estimate(SEVEN, clusters=range(10), cluster_correction=True).method


def test_clustered_interval_covers_where_the_plain_one_does_not():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(60), 5).tolist()
    hits = {"plain": 0, "clustered": 0}
    for _ in range(300):
        y = np.repeat(rng.normal(size=60), 5) + rng.normal(size=300)
        for name, clusters in (("plain", None), ("clustered", labels)):
            estimate = mean_estimate(y, clusters=clusters)
            hits[name] += estimate.ci_low <= 0 <= estimate.ci_high
    assert hits["clustered"] / 300 > 0.91
    assert hits["plain"] / 300 < 0.80


def test_one_question_says_nothing_about_its_error():
    for estimate in (mean_estimate([0.5]), mean_estimate([0.2, 0.8], clusters=["a", "a"])):
        assert estimate.value == 0.5
        assert math.isnan(estimate.stderr)
        assert (estimate.ci_low, estimate.ci_high) == (-math.inf, math.inf)
    assert mean_estimate([1.0, 1.0]).stderr == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_estimate([]), r"scores: got shape \(0,\)"),
        (lambda: mean_estimate([0.5, 1.0], ci="wilson"), "ci: got 'wilson' for scores between 0 and 1"),
        (lambda: mean_estimate([0, 1], ci="wilson", clusters=[0, 1]), "ci: got 'wilson' with clusters"),
        (lambda: mean_estimate([0, 1], ci="t"), "ci: got 't', expected one of 'normal'"),
        (lambda: mean_estimate([0, 1], level=95), "level: got 95"),
        (lambda: wilson_interval(3, 2), "successes: got 3, expected at most n = 2"),
        (lambda: wilson_interval(0, 0), "n: got 0"),
        (lambda: wilson_interval(-1, 2), "successes: got -1"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
