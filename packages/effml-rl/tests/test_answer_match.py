from fractions import Fraction

import pytest
from effml_rl.verifiers import ExactMatch, NumericMatch, extract_answer
from effml_rl.verifiers.answer_match import target_number
from effml_shared.errors import ConfigError


def judge(verifier, completion, target):
    (verdict,) = verifier([""], [completion], [target])
    return verdict.status, verdict.reward


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"Each day 9 are left, 9 * 2 = \boxed{18}", ("correct", 1.0)),
        (r"so \boxed{6} though 18 was said", ("wrong", 0.0)),
        ("definitely 18", ("correct", 1.0)),
        ("#### 18 dollars", ("correct", 1.0)),
        ("18.0", ("correct", 1.0)),
        ("36/2", ("correct", 1.0)),
        ("14.5 dollars", ("wrong", 0.0)),
        ("I do not know", ("unparseable", 0.0)),
        (r"\boxed{x + 18}", ("unparseable", 0.0)),
        ("", ("unparseable", 0.0)),
    ],
)
@pytest.mark.parametrize("target", [18, 18.0, "18", "2 * 9 = 18\n#### 18"])
def test_numeric(completion, expected, target):
    assert judge(NumericMatch(), completion, target) == expected


@pytest.mark.parametrize("target", [None, "no number", True, float("nan"), [18]])
def test_a_target_without_a_number_is_an_error(target):
    with pytest.raises(ConfigError, match=r"expected a number"):
        target_number(target)


def test_targets():
    assert target_number(Fraction(1, 2)) == Fraction(1, 2)
    assert target_number("1,000") == 1000


def test_exact():
    assert judge(ExactMatch(), " a  b\n", "a b") == ("correct", 1.0)
    assert judge(ExactMatch(), "a B", "a b") == ("wrong", 0.0)
    assert judge(ExactMatch(), " ", "a") == ("unparseable", 0.0)
    assert judge(ExactMatch(extract_answer), r"\boxed{x}", "x") == ("correct", 1.0)
    assert judge(ExactMatch(extract_answer), "nothing", "x") == ("unparseable", 0.0)
    with pytest.raises(ConfigError, match=r"expected a string"):
        judge(ExactMatch(), "18", 18)


@pytest.mark.parametrize("verifier", [ExactMatch(), NumericMatch()])
def test_lengths(verifier):
    assert verifier([], [], []) == []
    with pytest.raises(ConfigError, match=r"as many of each"):
        verifier(["a"], ["b"], [])
