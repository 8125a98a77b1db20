"""n-sample metrics against exact numbers, scipy's hypergeometric distribution and all subsets."""

import itertools
import math

import numpy as np
import pytest
from effml_eval.metrics.n_sample import g_pass_at_k, pass_all_at_k, pass_at_k, rm_at_k
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats


@st.composite
def counts(draw):
    n = draw(st.integers(1, 60))
    return n, draw(st.integers(0, n)), draw(st.integers(1, n))


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [
        (16, 3, 1, 0.1875),
        (16, 3, 4, 0.6071429),
        (16, 1, 8, 0.5),
        (10, 5, 2, 0.7777778),
        (5, 2, 3, 0.9),
        (200, 7, 100, 0.9929911),
        (7, 0, 3, 0),
        (7, 0, 7, 0),
        (7, 1, 7, 1),
        (7, 7, 1, 1),
    ],
)
def test_pass_at_k(n, c, k, value):
    assert pass_at_k(n, c, k) == pytest.approx(value, abs=5e-8)


def test_pass_all_and_g_pass():
    assert pass_all_at_k(16, 3, 2) == pytest.approx(0.025)
    assert g_pass_at_k(16, 10, 8, 0.5) == pytest.approx(0.9405594, abs=5e-8)
    assert g_pass_at_k(16, 10, 8, 1.0) == pytest.approx(0.0034965, abs=5e-8)
    assert g_pass_at_k(40, 20, 30, 0.1) == pytest.approx(stats.hypergeom.sf(2, 40, 20, 30))  # 0.1 * 30 > 3 in floats


@given(counts(), st.floats(0, 1))
def test_all_are_tails_of_the_hypergeometric_distribution(numbers, tau):
    n, c, k = numbers
    drawn = stats.hypergeom(n, c, k)
    assert pass_at_k(n, c, k) == pytest.approx(drawn.sf(0), abs=1e-10)
    assert pass_all_at_k(n, c, k) == pytest.approx(drawn.pmf(k), abs=1e-10)
    least = max(1, math.ceil(tau * k - 1e-9))
    assert g_pass_at_k(n, c, k, tau) == pytest.approx(drawn.sf(least - 1), abs=1e-10)
    assert g_pass_at_k(n, c, k, 0.0) == pass_at_k(n, c, k)
    assert g_pass_at_k(n, c, k, 1.0) == pass_all_at_k(n, c, k)
    assert pass_at_k(n, c, n) == (c > 0)


def test_shapes_follow_the_problems():
    values = pass_at_k([4, 6], np.array([1, 6], np.int8), 2)
    assert values.tolist() == [0.5, 1.0]
    assert pass_at_k(4, [[1, 2], [3, 4]], 4).tolist() == [[1, 1], [1, 1]]
    assert pass_at_k(4, np.array([], np.int64), 2).shape == (0,)


def naive_best_of(scores, correct, k):
    means = []
    for subset in itertools.combinations(range(len(scores)), k):
        best = max(scores[i] for i in subset)
        means.append(np.mean([correct[i] for i in subset if scores[i] == best]))
    return float(np.mean(means))


def test_best_of_k():
    assert [rm_at_k([9, 7, 5, 3], [0, 1, 1, 0], k) for k in (1, 2, 4)] == pytest.approx([0.5, 0.5, 0])
    assert [rm_at_k([2.0] * 5, [1, 0, 1, 0, 0], k) for k in range(1, 6)] == pytest.approx([0.4] * 5)


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=7), st.data())
def test_best_of_k_is_the_mean_over_all_subsets(samples, data):
    scores, correct = zip(*samples, strict=True)
    k = data.draw(st.integers(1, len(samples)))
    assert rm_at_k(scores, correct, k) == pytest.approx(naive_best_of(scores, correct, k))


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.data())
def test_perfect_scores_make_it_pass_at_k(correct, data):
    k = data.draw(st.integers(1, len(correct)))
    assert rm_at_k(correct, correct, k) == pytest.approx(float(pass_at_k(len(correct), sum(correct), k)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pass_at_k(4, [1], 5), "got 4, 1, 5, expected 0 <= correct <= n and k <= n"),
        (lambda: pass_at_k(4, [5], 2), "got 4, 5, 2"),
        (lambda: pass_at_k(4, [-1], 2), "got 4, -1, 2"),
        (lambda: pass_at_k(4, [0.5], 2), "n, correct: got .* float64"),
        (lambda: pass_at_k([4, 4], [1], 2), r"n, correct: got int64 \(2,\)"),
        (lambda: pass_at_k(4, [True], 2), "n, correct: got .* bool"),
        (lambda: pass_at_k(4, [1], 0), "k: got 0"),
        (lambda: g_pass_at_k(4, [1], 2, 1.5), "tau: got 1.5"),
        (lambda: rm_at_k([1, 2], [1], 1), r"scores, correct: got \(2,\) and \(1,\)"),
        (lambda: rm_at_k([1, math.nan], [1, 0], 1), "scores, correct: got NaN"),
        (lambda: rm_at_k([1, 2], [1, 0], 3), "k: got 3, expected at most the number of samples, 2"),
        (lambda: rm_at_k([], [], 1), "k: got 1, expected at most the number of samples, 0"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
