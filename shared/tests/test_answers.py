import time

import pytest
from effml_shared.data.answers import boxed_answer, extract_answer, last_number
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{18}", "18"),
        (r"first \boxed{6}, no: \boxed{\frac{7}{2}}. That is 3.5 #### 5", r"\frac{7}{2}"),
        (r"\boxed{7} then cut off \boxed{18", "7"),
        (r"\boxed {4}", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a{b}c}", "a{b}c"),
        ("3 + 4 = 7\n#### 7 apples\nDone in 2 steps", "7 apples"),
        ("#### 5\n#### 6", "6"),
        ("it costs $1,234.50.", "$1,234.50"),
        ("so 18.", "18"),
        ("definitely 18", "18"),
        ("5, 6, and 7", "7"),
        ("10 - 3", "3"),
        ("10-3", "3"),
        ("x = -5", "-5"),
        ("a half is 1/2", "1/2"),
        ("about 1.5e-3", "1.5e-3"),
        ("room B12 holds 7", "7"),
        ("", None),
        ("no number", None),
        ("####", None),
    ],
)
def test_final_answer(text, answer):
    assert extract_answer(text) == answer


def test_empty_mark_falls_back_to_the_last_number():
    assert extract_answer("so 18\n####\n") == "18"


@given(st.text(alphabet="\\boxed{}# 1.,-$/e", max_size=200))
def test_any_text(text):
    for find in (extract_answer, boxed_answer, last_number):
        found = find(text)
        assert found is None or found in text


@pytest.mark.parametrize("piece", ["{", r"\boxed{", "1,", "-", "#", "1 ", r"\boxed{}", "1/", ".", "$", "1e"])
def test_time_is_linear_in_the_text(piece):
    started = time.process_time()
    extract_answer(piece * 100_000)
    assert time.process_time() - started < 2.0  # quadratic would be minutes
