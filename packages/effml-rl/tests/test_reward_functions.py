import pytest
from effml_rl.verifiers import NumericMatch, RewardFunction, reward_function
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


@pytest.mark.parametrize("rewards", [[], [1, 2], [float("nan")], [float("inf")], ["good"], [[1]]])
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
