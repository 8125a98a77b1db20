from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from effml_eval.activations.embedding_checks import check_embeddings, match_pairs
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor


def rows(count: int = 6, dim: int = 4) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(0))


def changed(row: int, value: float, column: int | slice = slice(None)) -> Tensor:
    x = rows()
    x[row, column] = value
    return x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_takes_sound_rows(dtype: torch.dtype) -> None:
    check_embeddings(rows().to(dtype), dim=4)
    check_embeddings(rows(1))  # its columns are constant, and that says nothing
    check_embeddings(rows().T)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (changed(2, torch.nan, 1), r"^a\.npy: got 1 of 6 rows that hold NaN or infinity \(first: 2\), expected finite"),
        (changed(5, -torch.inf), r"got 1 of 6 rows that hold NaN or infinity \(first: 5\)"),
        (changed(3, 0.0), r"got 1 of 6 rows that are zero \(first: 3\), expected vectors with a norm"),
        (rows(0), r"got shape \(0, 4\)"),
        (rows(4, 0), r"got shape \(4, 0\)"),
        (rows()[0], r"got shape \(4,\)"),
        (torch.tensor(1.0), r"got shape \(\)"),
        (torch.ones(2, 4, dtype=torch.int64), r"of torch.int64, expected \(N, d\) of a floating type"),
        (rows(6, 5), r"got 5 dimensions, expected 4"),
    ],
)
def test_names_what_is_wrong(x: Tensor, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        check_embeddings(x, dim=4, name="a.npy")


def test_warns_of_constant_columns() -> None:
    x = rows(5, 8)
    x[:, [1, 3]] = 2.0
    with pytest.warns(UserWarning, match=r"^a: 2 of 8 columns are constant \(1, 3\)"):
        check_embeddings(x, name="a")
    x[:] = x[0].clone()
    with pytest.warns(UserWarning, match=r"8 of 8 columns are constant \(0, 1, 2, 3, 4, \.\.\.\)"):
        check_embeddings(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_embeddings(x, warn_of_constants=False)


def test_blocks_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effml_eval.activations.embedding_checks._BLOCK", 2)
    with pytest.raises(ConfigError, match=r"2 of 6 rows that are zero \(first: 3\)"):
        check_embeddings(torch.cat([changed(3, 0.0)[:5], torch.zeros(1, 4)]))
    x = rows()
    x[:5, 0] = 1.0
    check_embeddings(x)
    x[5, 0] = 1.0
    with pytest.warns(UserWarning, match=r"1 of 4 columns are constant \(0\)"):
        check_embeddings(x)


@given(st.data())
def test_every_row_finds_its_partner(data: Any) -> None:
    first = data.draw(st.lists(st.integers(-5, 50), min_size=1, max_size=8, unique=True))
    second = data.draw(st.permutations(first + data.draw(st.lists(st.sampled_from(first), max_size=5))))
    found = match_pairs(np.array(first), np.array(second))
    assert [first[i] for i in found] == second


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        ([1, 2, 1], [1, 2], r"pairs: got number 1 twice in image"),
        ([1, 2], [1, 2, 7, 8], r"got 2 of 4 rows of text without a partner in image \(first: number 7\)"),
        ([1, 2, 3], [2, 1], r"got 1 of 3 rows of image without a partner in text \(first: number 3\)"),
    ],
)
def test_names_mismatched_pairs(first: list[int], second: list[int], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        match_pairs(np.array(first), np.array(second), names=("image", "text"))
