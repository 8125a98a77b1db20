"""Grids are read as people write them, and every point has a name of its own that a file system takes."""

import re

import pytest
from effml_shared.errors import ConfigError
from effml_shared.sweeps.grid import grid_points, parse_grid
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("lr=0.01,0.1", ["0.01", "0.1"]),
        ("lr=0.01", ["0.01"]),
        ("lr= 0.01 , 1e-3", ["0.01", "1e-3"]),
        ("seeds=[1,2],[3]", ["[1,2]", "[3]"]),
        ("seeds=[[1,2],[3]],[]", ["[[1,2],[3]]", "[]"]),
        ("model={a: 1, b: 2},{a: 3}", ["{a: 1, b: 2}", "{a: 3}"]),
        ("corpus='a,b',\"c,d\",e", ["'a,b'", '"c,d"', "e"]),
        ("corpus='it''s, fine',x", ["'it''s, fine'", "x"]),
        (r'corpus="a\",b",x', [r'"a\",b"', "x"]),
        ("corpus=it's,isn't", ["it's", "isn't"]),
        ("names=['a]',b],[c]", ["['a]',b]", "[c]"]),
        ("command=a=b,c=d", ["a=b", "c=d"]),
        ("end=null,''", ["null", "''"]),
    ],
)
def test_values_are_what_stands_between_commas(word, values):
    field = word.partition("=")[0]
    assert parse_grid([word]) == {field: values}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lr"], r"--grid: got 'lr', expected FIELD=VALUE,VALUE"),
        (["=1,2"], r"expected FIELD=VALUE"),
        (["lr="], r"--grid lr: got '' with an empty value"),
        (["lr=1,,2"], r"empty value"),
        (["lr=1,2,"], r"empty value"),
        (["lr=1,2,1"], r"--grid lr: got 1 twice"),
        (["lr=1,2", "lr=3"], r"--grid: got lr twice"),
        (["lr=[1,2"], r"expected a closing \]"),
        (["lr=1,2]"], r"expected brackets that match"),
        (["lr=[1,{2]}"], r"expected brackets that match"),
        (["lr='1,2"], r"expected a closing '"),
    ],
)
def test_what_is_no_grid_says_so(words, message):
    with pytest.raises(ConfigError, match=message):
        parse_grid(words)


def test_points_are_all_combinations_the_last_field_changing_fastest():
    points = grid_points({"a": ["1", "2"], "b.c": ["x", "y"]})
    assert [point.name for point in points] == ["a=1,b.c=x", "a=1,b.c=y", "a=2,b.c=x", "a=2,b.c=y"]
    assert points[1].values == {"a": "1", "b.c": "y"}


def test_names_that_a_file_system_refuses_are_changed_and_still_differ():
    names = [point.name for point in grid_points({"corpus": ["a/b", "a:b", "a-b", "..", "x" * 300, "x" * 299 + "y"]})]
    assert len(set(names)) == len(names)
    assert names[2] == "corpus=a-b"
    assert re.fullmatch(r"corpus=a-b-[0-9a-f]{8}", names[0])
    assert all(len(name) < 140 for name in names)


values = st.one_of(
    st.integers().map(str),
    st.floats(allow_nan=False).map(repr),
    st.lists(st.integers()).map(str),
    st.text(st.characters(exclude_categories=("Cs", "Cc"))).map(lambda text: "'" + text.replace("'", "''") + "'"),
)


@given(st.lists(values, min_size=1, max_size=5, unique=True))
def test_whatever_the_values_they_come_back_and_name_different_files(written):
    grid = parse_grid([f"field={','.join(written)}"])
    assert grid == {"field": written}
    names = [point.name for point in grid_points(grid)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_.,=+\[\]-]+", name) for name in names)
