import pytest
from effml_rl.verifiers.verdict import Verdict, check_lengths
from effml_shared.errors import ConfigError


def test_correct_is_one_and_wrong_is_zero():
    assert (Verdict.of(True).reward, Verdict.of(True).status) == (1.0, "correct")
    assert (Verdict.of(False, 3).reward, Verdict.of(False, 3).status) == (0.0, "wrong")


@pytest.mark.parametrize(
    ("reward", "status"),
    [
        (0.0, "sandbox_error"),
        (None, "wrong"),
        (None, "scored"),
        (1.0, "unscored"),
        (float("nan"), "scored"),
        (1.0, "ok"),
    ],
)
def test_no_silent_zero_and_no_reward_from_nowhere(reward, status):
    with pytest.raises(ConfigError):
        Verdict(reward, status)


def test_as_many_of_each():
    check_lengths(["a"], ["b"], [1])
    with pytest.raises(ConfigError, match=r"1 prompts, 2 completions and 1 targets"):
        check_lengths(["a"], ["b", "c"], [1])
