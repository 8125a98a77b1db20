import math

import pytest
from effml_eval.metrics.equivalence import (
    exact_equal,
    is_correct,
    normalize_text,
    normalized_equal,
    numeric_equal,
)
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize("equal", [exact_equal, normalized_equal, numeric_equal])
def test_none_equals_nothing(equal):
    assert not equal(None, None)
    assert not equal(None, "1")
    assert not equal("1", None)
    assert equal("1", "1")


def test_several_golds_any():
    assert is_correct("b", ["a", "b"], exact_equal)
    assert is_correct("b", {"a", "b"}, exact_equal)
    assert is_correct("b", ("b",), exact_equal)
    assert not is_correct("ab", "a b", exact_equal)
    assert not is_correct(None, ["a"], exact_equal)
    for gold in (None, [], ["a", None]):
        with pytest.raises(ConfigError, match="gold: got"):
            is_correct("a", gold, exact_equal)


def test_normalisation():
    assert normalize_text("  The cat,\n an  OWL! ") == "cat owl"
    assert normalize_text("The cat", articles=False) == "the cat"
    assert normalize_text("The cat", casefold=False) == "The cat"
    assert normalize_text("cat!", punctuation=False) == "cat!"
    assert normalize_text("Straße") == "strasse"
    assert not normalized_equal("theatre", "the atre")
    assert normalized_equal("5.", 5)


@pytest.mark.parametrize(
    ("text", "value"),
    [("-1,234.5", -1234.5), ("$5", 5), (r"\frac{3}{4}", 0.75), ("-3/4", -0.75), ("12.5%", 0.125), (r"50\%.", 0.5)],
)
def test_forms_of_numbers(text, value):
    assert numeric_equal(text, value)
    assert numeric_equal(value, text)
    assert not numeric_equal(text, value + 1)


def test_tolerance_is_relative_above_one_and_absolute_below():
    assert numeric_equal("1000000.5", "1000000")
    assert not numeric_equal("1000002.5", "1000000")
    assert not numeric_equal("1000001", "1000000")  # two integers
    assert numeric_equal("0.0000005", "0")
    assert not numeric_equal("0.000002", "0")


def test_per_cent_on_one_side_may_be_read_either_way():
    assert numeric_equal("50%", "50")
    assert numeric_equal("50%", "0.5")
    assert numeric_equal("0.5", r"50\%")
    assert numeric_equal("50%", "50 %")
    assert not numeric_equal("50%", "5")
    assert not numeric_equal("0.5%", "50%")
    assert not numeric_equal("33.3%", "1/3")


def test_numbers_that_are_no_text():
    assert numeric_equal("0.5", 0.5)
    assert numeric_equal(2, "2")
    assert not numeric_equal(math.nan, math.nan)
    assert not numeric_equal("inf", math.inf)
    assert numeric_equal(10**400, str(10**400))
    assert not numeric_equal(True, 1)
    assert not numeric_equal([1], 1)
    assert exact_equal(3, 3)
    assert not exact_equal(math.nan, math.nan)


@given(st.floats(-1e12, 1e12))
def test_what_python_writes_is_read(value):
    assert numeric_equal(repr(value), value)
    assert numeric_equal(f"{value:,.3f}", round(value, 3))
