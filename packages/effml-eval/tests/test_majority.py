"""The vote of k samples against all subsets and exact numbers."""

import itertools
from collections import Counter

import numpy as np
import pytest
from effml_eval.metrics.equivalence import numeric_equal
from effml_eval.metrics.majority import answer_classes, maj_at_k
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st


def naive(answers, golds, k):
    """Return the mean over all subsets of the share of right answers among the commonest."""
    wins = []
    for subset in itertools.combinations(answers, k):
        votes = Counter(answer for answer in subset if answer is not None)
        top = [answer for answer, count in votes.items() if count == max(votes.values())]
        wins.append(np.mean([answer in golds for answer in top]) if top else 0.0)
    return float(np.mean(wins))


@pytest.mark.parametrize(
    ("answers", "k", "value"),
    [
        ("AAABBC", 1, 0.5),
        ("AAABBC", 3, 0.6),
        ("AAABBC", 6, 1),
        ("AABB", 4, 0.5),
        ("AAB", 2, 2 / 3),
        ([None, None], 2, 0),
        ([None, "A"], 2, 1),
        ([None, "A"], 1, 0.5),
        ("BBB", 2, 0),
    ],
)
def test_votes(answers, k, value):
    assert maj_at_k(list(answers), "A", k) == pytest.approx(value, abs=1e-12)


@given(st.lists(st.sampled_from(["A", "B", "C", "D", None]), min_size=1, max_size=9), st.data())
def test_equals_the_mean_over_all_subsets(answers, data):
    k = data.draw(st.integers(1, len(answers)))
    golds = data.draw(st.sampled_from([["A"], ["A", "C"]]))
    assert maj_at_k(answers, golds, k) == pytest.approx(naive(answers, golds, k), abs=1e-12)


@given(st.permutations([*"AAABBCCD", None, None]), st.integers(1, 10))
def test_order_of_the_samples_does_not_matter(answers, k):
    assert maj_at_k(answers, "A", k) == pytest.approx(maj_at_k(sorted(answers, key=str), "A", k), abs=1e-12)


def test_many_samples_agree_with_random_subsets():
    answers = ["A"] * 20 + ["B"] * 17 + ["C"] * 9 + [str(i) for i in range(10)] + [None] * 8
    rng = np.random.default_rng(0)
    wins = [naive([answers[i] for i in rng.choice(64, 16, replace=False)], ["A"], 16) for _ in range(3000)]
    assert maj_at_k(answers, "A", 16) == pytest.approx(np.mean(wins), abs=4 * np.std(wins) / 3000**0.5)
    assert sum(maj_at_k(answers, gold, 16) for gold in sorted({*answers} - {None})) == pytest.approx(1, abs=1e-10)


def test_no_binomial_overflows():
    answers = ["A"] * 900 + ["B"] * 800 + ["C"] * 300
    assert 0.5 < maj_at_k(answers, "A", 40) < 1
    assert maj_at_k(answers, "A", 2000) == 1
    assert maj_at_k(["A"] * 600 + ["B"] * 500, "A", 1099) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("classes", [1, 4, 16, 64])
def test_equal_classes_share_the_wins(classes):
    answers = [str(i % classes) for i in range(64)]
    for k in (1, 7, 32, 63):
        assert maj_at_k(answers, "0", k) == pytest.approx(1 / classes, rel=1e-12)


def test_first_k_is_a_vote_of_these_alone():
    answers = list("BBAAA")
    assert maj_at_k(answers, "A", 2, first_k=True) == 0
    assert maj_at_k(answers, "A", 4, first_k=True) == 0.5
    assert maj_at_k(answers, "A", 5, first_k=True) == maj_at_k(answers, "A", 5) == 1


def test_equality_decides_the_classes():
    answers = ["0.5", "1/2", "3", None, "0.50"]
    assert answer_classes(answers, numeric_equal) == [[0, 1, 4], [2]]
    assert maj_at_k(answers, "50%", 5, equal=numeric_equal) == 1
    assert maj_at_k(answers, "3", 5) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: maj_at_k(["A"], "A", 2), "k: got 2, expected at most the number of samples, 1"),
        (lambda: maj_at_k(["A"], "A", 0), "k: got 0"),
        (lambda: maj_at_k([], "A", 1), "k: got 1, expected at most the number of samples, 0"),
        (lambda: maj_at_k(["A"], None, 1), "gold: got None"),
        (lambda: maj_at_k([None], [], 1), r"gold: got \[\]"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
