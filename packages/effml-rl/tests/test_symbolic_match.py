import importlib.util

import pytest
from effml_rl.verifiers import SymbolicMatch
from effml_shared.errors import ConfigError, MissingExtra

installed = importlib.util.find_spec("math_verify") is not None
needs_math_verify = pytest.mark.skipif(not installed, reason="math-verify is not installed: effml-rl[math]")


@pytest.mark.skipif(installed, reason="math-verify is installed")
def test_the_extra_is_named():
    with pytest.raises(MissingExtra, match=r"effml-rl\[math\]"):
        SymbolicMatch()


@pytest.fixture(scope="module")
def verifier():
    verifier = SymbolicMatch(timeout=3.0, workers=1)
    yield verifier
    verifier.close()


@needs_math_verify
@pytest.mark.parametrize(
    ("answer", "target", "status"),
    [
        (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", "correct"),
        (r"(x+1)^2", r"x^2 + 2x + 1", "correct"),
        (r"\{2, 1\}", r"\{1, 2\}", "correct"),
        (r"x^2", r"x^3", "wrong"),
        (r"\frac{1}{2}", "0.5", "correct"),
        ("18", 18, "correct"),
        (r"\sqrt{2}", "1", "wrong"),
        pytest.param(r"2^{10^{10^{10}}}", r"x^2", "any", marks=pytest.mark.slow),  # as long as the time limit
        (r"__import__('os').system('true')", r"x^2", "any"),
    ],
)
def test_same_object(verifier, answer, target, status):
    (verdict,) = verifier([""], [rf"so \boxed{{{answer}}}"], [target])
    assert verdict.status == status or (status == "any" and verdict.reward == 0.0), verdict


@needs_math_verify
def test_no_answer_and_no_target(verifier):
    assert verifier([""], ["nothing"], ["x^2"])[0].status == "unparseable"
    with pytest.raises(ConfigError, match=r"expected a mathematical expression"):
        verifier([""], ["1"], [""])
