import json
import math

import pytest
from effml_rl.sandbox.values import NotPlain, decode, encode
from hypothesis import given
from hypothesis import strategies as st

LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
HASHABLE = st.recursive(LEAVES, lambda inner: st.tuples(inner, inner), max_leaves=4)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(HASHABLE, inner, max_size=3),
    max_leaves=8,
)
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("dict"), inner))


def sent(value):
    return decode(json.loads(json.dumps(encode(value))))


@given(VALUES)
def test_round_trip_keeps_value_and_types(value):
    assert repr(sent(value)) == repr(value)


@given(st.sets(HASHABLE, max_size=4))
def test_round_trip_of_sets(value):
    assert sent([value]) == [value]


@given(JSON)
def test_anything_else_is_refused_and_never_crashes(data):
    try:
        decode(data)
    except NotPlain:
        return


def test_nan_and_infinity_pass():
    assert math.isnan(sent(math.nan))
    assert sent(-math.inf) == -math.inf


class Always(int):
    def __eq__(self, other):
        return True

    __hash__ = int.__hash__


@pytest.mark.parametrize("value", [Always(1), [Always(1)], {"a": Always(1)}, (Always(1),), object(), len, 1j, b"x"])
def test_only_exact_types_leave(value):
    with pytest.raises(NotPlain, match=r"is not plain data"):
        encode(value)


@pytest.mark.parametrize(
    "data", [{}, {"tuple": 1}, {"a": []}, {"set": [[1]]}, {"dict": [[1]]}, {"tuple": [], "set": []}]
)
def test_only_what_went_in_comes_out(data):
    with pytest.raises(NotPlain):
        decode(data)


def test_a_value_that_holds_itself():
    value = []
    value.append(value)
    with pytest.raises(RecursionError):
        encode(value)
