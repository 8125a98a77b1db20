"""Mixtures: exact counts, fractions without replacement, and one order per seed."""

from collections import Counter

import pytest
from effml_shared.data.mixtures import MixtureBuilder
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st

SOURCES = {"a": [f"a{i}" for i in range(100)], "b": [f"b{i}" for i in range(100)]}
units = pytest.mark.parametrize("unit", ["examples", "shards"])


@units
def test_whole_repeats_are_exact(unit):
    documents = MixtureBuilder({"a": 4, "b": 1}, unit=unit).documents(SOURCES)
    counts = Counter(documents)
    assert len(documents) == 500
    assert [counts[document] for document in SOURCES["a"]] == [4] * 100
    assert [counts[document] for document in SOURCES["b"]] == [1] * 100


@units
@pytest.mark.parametrize(
    ("repeat", "size"), [(0.25, {"examples": 25, "shards": 20}), (2.25, {"examples": 225, "shards": 220})]
)
def test_fractions_are_drawn_without_replacement(unit, repeat, size):
    counts = Counter(MixtureBuilder({"a": repeat}, unit=unit).documents(SOURCES))
    assert sum(counts.values()) == size[unit]
    assert max(counts.values()) - min(counts.values()) <= 1
    assert min(counts.values()) >= int(repeat)


def test_shards_are_consecutive():
    places = [i for _, i in MixtureBuilder({"a": 0.3}, unit="shards", shards=10).places({"a": 95})]
    starts = {95 * k // 10: 95 * (k + 1) // 10 for k in range(10)}
    found = 0
    for start, stop in starts.items():
        inside = [i for i in places if start <= i < stop]
        assert inside in ([], list(range(start, stop)))
        found += bool(inside)
    assert found == 3


@units
def test_a_small_fraction_is_at_least_one(unit):
    assert len(MixtureBuilder({"a": 1e-9}, unit=unit).documents(SOURCES)) == {"examples": 1, "shards": 10}[unit]


@given(st.integers(0, 100), st.floats(0.01, 3), st.floats(0.01, 3))
def test_order_follows_from_the_seed(seed, a, b):
    first, again = (MixtureBuilder({"a": a, "b": b}, seed=seed).documents(SOURCES) for _ in range(2))
    assert first == again
    other = MixtureBuilder({"a": a, "b": b}, seed=seed + 1).documents(SOURCES)
    assert len(other) == len(first)
    assert other != first or len(first) < 4


def test_sources_that_are_not_named_stay_out():
    assert set(MixtureBuilder({"a": 1}).documents(SOURCES)) == set(SOURCES["a"])


@pytest.mark.parametrize(
    "settings",
    [
        *({"repeats": {}}, {"repeats": {"a": 0}}, {"repeats": {"a": -1}}, {"repeats": {"a": float("nan")}}),
        *({"repeats": {"a": float("inf")}}, {"repeats": {"a": "2"}}, {"repeats": {"a": 1}, "unit": "files"}),
        {"repeats": {"a": 1}, "shards": 0},
    ],
)
def test_impossible_settings(settings):
    with pytest.raises(ConfigError, match=r"got"):
        MixtureBuilder(**settings)


def test_impossible_sources():
    for sources in ({}, {"a": []}, {"b": ["x"]}):
        with pytest.raises(ConfigError, match=r"repeats.a: got a source that is missing or empty"):
            MixtureBuilder({"a": 1}).documents(sources)
    with pytest.raises(ConfigError, match=r"shards: got 10 of the 4 documents"):
        MixtureBuilder({"a": 0.5}, unit="shards").documents({"a": ["x"] * 4})
