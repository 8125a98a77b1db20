import pytest
import torch
from effml_rl.verifiers import NumericMatch, RewardFunction, reward_function
from effml_rl.verifiers.reward_functions import as_verifier
from effml_shared.errors import ConfigError


def lengths(prompts, completions, target):
    return [None if t is None else len(c) / t for c, t in zip(completions, target, strict=True)]


def test_numbers_and_none():
    verdicts = RewardFunction(lengths)(["", ""], ["abcd", "x"], [2, None])
    assert [(v.reward, v.status) for v in verdicts] == [(2.0, "scored"), (None, "unscored")]


def test_columns():
    def both(prompts, completions, a, b):
        return [x + y for x, y in zip(a, b, strict=True)]

    assert RewardFunction(both)(["", ""], ["", ""], [{"a": 1, "b": 2}, {"a": 3, "b": 4}])[1].reward == 7.0
    assert RewardFunction(lambda p, c, gold: gold, column="gold")([""], [""], [3])[0].reward == 3.0
    with pytest.raises(ConfigError, match=r"different keys"):
        RewardFunction(both)(["", ""], ["", ""], [{"a": 1, "b": 2}, {"a": 3}])


@pytest.mark.parametrize(
    "function",
    [
        lambda completions, **columns: [len(c) for c in completions],
        lambda *, prompts, completions: [len(c) for c in completions],
        lambda prompts, completions: [len(c) for c in completions],
        lambda p, c: [len(x) for x in c],
        lambda c_first, c, target: [len(x) for x in c],
    ],
)
def test_a_function_gets_what_it_has_parameters_for(function):
    assert RewardFunction(function)(["?"], ["four"], [None])[0].reward == 4.0


@pytest.mark.parametrize(("wrong", "message"), [(NumericMatch, r"got the class NumericMatch"), (max, r"got max")])
def test_what_cannot_be_called_as_one_is_named(wrong, message):
    with pytest.raises(ConfigError, match=rf"verifier: {message}"):
        as_verifier(wrong)


@pytest.mark.parametrize(
    "rewards", [None, 1.0, [], [1, 2], [float("nan")], [float("inf")], ["good"], [[1]], torch.ones(1, 2)]
)
def test_bad_rewards(rewards):
    with pytest.raises(ConfigError, match=r"rewards: got"):
        RewardFunction(lambda *_, **__: rewards)([""], [""], [None])


def test_errors_of_the_function_are_the_users():
    with pytest.raises(ZeroDivisionError):
        RewardFunction(lambda *_, **__: 1 / 0)([""], [""], [None])


def test_there_and_back():
    plain = reward_function(NumericMatch(), column="gold")
    assert plain(["", ""], ["18", "17"], gold=[18, 18], other=[1, 2]) == [1.0, 0.0]
    verdicts = RewardFunction(plain, column="gold")(["", ""], ["18", "17"], [18, 18])
    assert [v.reward for v in verdicts] == [1.0, 0.0]
    with pytest.raises(ConfigError, match=r"'gold'"):
        plain([""], [""], answer=[1])
