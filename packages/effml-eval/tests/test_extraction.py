import time

import pytest
from effml_eval.metrics.extraction import (
    EXTRACTORS,
    answer_is,
    choice_letter,
    extractor,
    last_number,
    regex_extractor,
)
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{1", None),
        (r"\boxed{1} \boxed{2", "1"),
        (r"\boxed{1 \boxed{2}", "2"),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"\boxed {4}", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"}} \boxed{3} }", "3"),
        (r"\boxed{}", ""),
        ("no box {1}", None),
        ("", None),
    ],
)
def test_boxed(text, answer):
    assert EXTRACTORS["boxed"](text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is 42.", "42"),
        ("The answer is 3.5. Then I checked.", "3.5"),
        ("Answer: $\\frac{1}{2}$\nmore", "\\frac{1}{2}"),
        ("the answer is: **7**", "7"),
        ("the answer is 1. No, the answer is 2", "2"),
        ("the answer is 1. And the answer is", "1"),
        ("the answer isn't known", None),
        ("no such phrase", None),
        ("", None),
    ],
)
def test_answer_is(text, answer):
    assert answer_is(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She pays $1,234.50.", "1234.50"),
        ("so 18.", "18"),
        ("10-3", "3"),
        ("10 - 3", "3"),
        ("x = -5", "-5"),
        ("x = −5", "-5"),
        ("loses -$40", "-40"),
        ("up +7%", "7"),
        ("about 1.5e-3", "1.5e-3"),
        ("or .25", ".25"),
        ("1, 2, 3", "3"),
        ("a half is 1/2", "1/2"),
        ("1,000,000", "1000000"),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, answer):
    assert last_number(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is (B).", "B"),
        ("Answer: C", "C"),
        ("answer is **D**", "D"),
        ("the answer is c.", "C"),
        ("the answer is a dog", None),
        ("The answer is A", "A"),
        ("The answer is B because of C", "B"),
        ("I think (A) is wrong and (D) is right", "D"),
        ("B", "B"),
        ("B. Paris", "B"),
        ("**C**", "C"),
        ("A dog", None),
        ("The answer is Berlin", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_choice_letter(text, answer):
    assert choice_letter(text) == answer


def test_regex():
    text = "#### 5\n#### 18\n"
    assert regex_extractor(r"#### (\S+)")(text) == "18"
    assert regex_extractor(r"#### (\S+)", "first")(text) == "5"
    assert regex_extractor(r"\d+")(text) == "18"
    assert regex_extractor(r"x(y)?")("x") is None
    assert regex_extractor("z")(text) is None
    assert str(regex_extractor(r"a", version=3)) == "regex:last:a@3"
    assert extractor(r"regex:#### (\S+)")(text) == "18"


def test_names_and_versions():
    assert {str(rule) for rule in EXTRACTORS.values()} == {"boxed@1", "answer_is@1", "last_number@1", "choice_letter@1"}
    for name in EXTRACTORS:
        assert extractor(name).name == name
    with pytest.raises(ConfigError, match="extractor: got 'boxes', expected one of 'boxed'"):
        extractor("boxes")
    with pytest.raises(ConfigError, match="pattern: got '\\(', expected a regular expression"):
        regex_extractor("(")
    with pytest.raises(ConfigError, match="which: got 'all'"):
        regex_extractor("a", "all")


@given(st.text(alphabet="\\boxed{}# 1.,-$/e answeri:A()\n", max_size=200) | st.text())
def test_any_text(text):
    for rule in EXTRACTORS.values():
        answer = rule(text)
        assert answer is None or isinstance(answer, str)
    assert (found := EXTRACTORS["boxed"](text)) is None or found in text


@pytest.mark.parametrize(
    "piece", ["{", "\\boxed{", "\\boxed ", "111,", "-", "1 ", "1.", "$", "1e", "answer is ", "answer: \n", "(A", "* "]
)
def test_time_is_linear_in_the_text(piece):
    started = time.process_time()
    for rule in EXTRACTORS.values():
        rule(piece * 50_000 + "1111")
    assert time.process_time() - started < 4.0  # quadratic would be minutes
