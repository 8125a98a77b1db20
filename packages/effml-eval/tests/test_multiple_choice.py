import math

import numpy as np
import pytest
from effml_eval.metrics.multiple_choice import expected_calibration_error, multiple_choice_scores
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st

LL, CHOICES = [-6.0, -5.0, -9.0], ["cat", "dog", "elephants"]


def chosen(metric, **ingredients):
    """Return the index that a metric takes for the best choice."""
    return [multiple_choice_scores(LL, gold, **ingredients)[metric] for gold in range(3)].index(1.0)


def test_choices_taken():
    assert chosen("acc") == 1
    assert chosen("acc_norm", choices=CHOICES) == 2
    assert chosen("acc_pmi", unconditional=[-3.0, -1.0, -7.5]) == 2
    assert chosen("acc_token", tokens=[1, 1, 2]) == 2
    assert chosen("acc_token", tokens=[2, 1, 1]) == 0


def test_bytes_are_not_characters():
    scores = multiple_choice_scores([-4.0, -5.0], 0, choices=["ab", "日本"])
    assert (scores["acc_norm"], scores["acc_bytes"]) == (1.0, 0.0)


def test_probabilities():
    scores = [multiple_choice_scores(LL, gold) for gold in range(3)]
    assert [each["prob"] for each in scores] == pytest.approx([0.265388, 0.721399, 0.013213], abs=5e-7)
    assert [each["nll"] for each in scores] == pytest.approx([-math.log(each["prob"]) for each in scores])
    assert scores[0]["confidence"] == scores[1]["prob"]
    brier = multiple_choice_scores(np.log([0.2, 0.5, 0.3]), 1)["brier"]
    assert brier == pytest.approx(0.38)


def test_ties_go_to_the_first_and_a_uniform_model_takes_index_0():
    scores = [multiple_choice_scores([-2.0] * 4, gold, choices=["a", "b", "c", "d"]) for gold in range(4)]
    assert [each["acc"] for each in scores] == [each["acc_norm"] for each in scores] == [1, 0, 0, 0]


def test_excluded_choices_and_absent_ingredients():
    scores = multiple_choice_scores([-math.inf, -3.0], 0)
    assert (scores["acc"], scores["prob"], scores["nll"]) == (0, 0, math.inf)
    assert scores["brier"] == 2
    assert "acc_norm" not in scores
    assert "acc_pmi" not in scores


@given(st.lists(st.floats(-1e4, 0), min_size=1, max_size=6), st.data(), st.floats(-100, 100))
def test_a_shift_of_all_choices_changes_no_probability(ll, data, shift):
    gold = data.draw(st.integers(0, len(ll) - 1))
    scores, moved = (multiple_choice_scores([x + s for x in ll], gold) for s in (0.0, shift))
    for name in ("prob", "brier", "nll", "confidence"):
        assert moved[name] == pytest.approx(scores[name], rel=1e-6, abs=1e-6)
    assert 0 <= scores["brier"] <= 2 + 1e-12


def test_calibration_error():
    assert expected_calibration_error([0.9, 0.9, 0.6], [1, 0, 1]) == pytest.approx((2 * 0.4 + 0.4) / 3)
    assert expected_calibration_error([1.0, 1.0, 0.0], [1, 1, 0]) == 0
    # bins are open below: 0.5 belongs to (0, 0.5], not to the bin above it
    assert expected_calibration_error([0.5, 0.6], [1, 0], bins=2) == pytest.approx((0.5 + 0.6) / 2)
    assert expected_calibration_error([0.4, 0.5], [1, 0], bins=2) == pytest.approx(0.1 / 2)


def test_calibrated_confidences_have_a_small_error():
    rng = np.random.default_rng(0)
    p = rng.random(20_000)
    assert expected_calibration_error(p, rng.random(20_000) < p) < 0.02
    assert expected_calibration_error(p, rng.random(20_000) < p**2) > 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: multiple_choice_scores(LL, 3), "gold: got 3, expected the index of one of 3 choices"),
        (lambda: multiple_choice_scores(LL, -1), "gold: got -1"),
        (lambda: multiple_choice_scores(LL, 1.0), "gold: got 1.0"),
        (lambda: multiple_choice_scores(LL, None), "gold: got None"),
        (lambda: multiple_choice_scores([], 0), "logprobs: got"),
        (lambda: multiple_choice_scores([-1, math.nan], 0), "logprobs: got"),
        (lambda: multiple_choice_scores([-math.inf] * 2, 0), "logprobs: got"),
        (lambda: multiple_choice_scores(LL, 0, choices=["a", "", "c"]), "choices: got lengths"),
        (lambda: multiple_choice_scores(LL, 0, choices=["a"]), "choices: got lengths"),
        (lambda: multiple_choice_scores(LL, 0, tokens=[1, 0, 1]), "tokens: got lengths"),
        (lambda: multiple_choice_scores(LL, 0, unconditional=[-1.0]), "unconditional: got"),
        (lambda: multiple_choice_scores(LL, 0, unconditional=[-1.0, -math.inf, 0]), "unconditional: got"),
        (lambda: expected_calibration_error([1.5], [1]), "confidence: got"),
        (lambda: expected_calibration_error([0.5], [1, 0]), "confidence: got"),
        (lambda: expected_calibration_error([], []), "confidence: got"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
