from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_eval.concepts.code_entries import (
    check_codes,
    check_matrix,
    check_pairs,
    concept_blocks,
    decode,
    entries,
    row_chunks,
    unit_rows,
)
from effml_eval.sae.sparse_codes import SparseCodes
from effml_shared.errors import ConfigError


def _sparse(rows: int = 6, k: int = 3, n_concepts: int = 5) -> SparseCodes:
    g = torch.Generator().manual_seed(0)
    values = torch.rand(rows, k, generator=g, dtype=torch.float64)
    values[0] = 0
    return SparseCodes(values, torch.randint(n_concepts, (rows, k), generator=g), n_concepts)


def test_dense_and_sparse_codes_list_the_same_entries_even_where_a_concept_stands_twice() -> None:
    sparse = _sparse()
    assert any(len(row.unique()) < 3 for row in sparse.indices)
    for one, other in zip(entries(sparse), entries(sparse.dense()), strict=True):
        torch.testing.assert_close(one, other)


def test_entries_that_cancel_are_none() -> None:
    found = entries(SparseCodes(torch.tensor([[1.0, -1.0, 2.0]]), torch.tensor([[4, 4, 0]]), 5))
    assert found.concepts.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_codes_are_widened_before_values_are_added(dtype: torch.dtype) -> None:
    codes = SparseCodes(torch.tensor([[2048.0, 1.0]], dtype=dtype), torch.tensor([[0, 0]]), 1)
    assert entries(codes).values.tolist() == [2049.0]
    assert decode(codes, torch.ones(1, 1)).tolist() == [[2049.0]]


@pytest.mark.parametrize("block", [1, 7, 13, 1 << 22])
def test_blocks_of_concepts_cover_everything_once(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effml_eval.concepts.code_entries.BLOCK", block)
    sparse = _sparse()
    for codes in ((sparse,), (sparse.dense(),), (sparse, sparse.dense())):
        total = torch.zeros(len(codes), 5, dtype=torch.float64)
        for start, _, blocks in concept_blocks(*codes):
            for i, found in enumerate(blocks):
                total[i].index_add_(0, found.concepts + start, found.values)
        torch.testing.assert_close(total, sparse.dense().sum(0).expand(len(codes), 5))


def test_rows_come_in_chunks_and_decode_as_the_dense_product() -> None:
    sparse, atoms = _sparse(), torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for codes in (sparse, sparse.dense()):
        parts = [decode(part, atoms) for part in row_chunks(codes, 4)]
        assert [len(part) for part in parts] == [4, 2]
        torch.testing.assert_close(torch.cat(parts), sparse.dense() @ atoms)
    empty = SparseCodes(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.int64), 5)
    assert decode(empty, atoms).shape == (3, 4)
    assert entries(empty).rows.shape == (0,)


def test_unit_rows_survive_sizes_whose_squares_do_not() -> None:
    torch.testing.assert_close(
        unit_rows("d", torch.tensor([[3e-30, 4e-30], [6e30, 8e30]])), torch.tensor([[0.6, 0.8]] * 2)
    )
    with pytest.raises(ConfigError, match=r"^d: got 1 atoms of norm 0, the first at 1, expected none$"):
        unit_rows("d", torch.tensor([[1.0], [0.0]]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([[1.0]], r"^x: got list"),
        (torch.ones(2, 2, dtype=torch.int64), r"^x: got a tensor of torch.int64"),
        (torch.ones(2), r"^x: got shape \(2,\), expected \(rows, at least one column\)"),
        (torch.tensor(1.0), r"^x: got shape \(\)"),
        (torch.tensor([[torch.nan, 1.0]]), r"^x: got 1 of 2 numbers NaN or infinite"),
        (torch.eye(2).to_sparse(), r"^x: got a tensor of torch.float32, torch.sparse_coo"),
    ],
)
def test_matrices_are_checked(bad: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_matrix("x", bad)


def test_codes_are_checked() -> None:
    good = torch.ones(2, 1)
    for bad, message in (
        (SparseCodes(good, torch.full((2, 1), 3), 3), r"index outside \[0, 3\)"),
        (SparseCodes(good, torch.zeros(2, 2, dtype=torch.int64), 3), r"both \(rows, k\)"),
        (
            SparseCodes(good, torch.zeros(2, 1, dtype=torch.int32), 3),
            r"of torch.int32, expected floating values and int64",
        ),
        (torch.zeros(2, 0), r"^z: got shape \(2, 0\), expected \(rows, at least one column\)$"),
        (SparseCodes(good * torch.inf, torch.zeros(2, 1, dtype=torch.int64), 3), r"2 of 2 numbers NaN or infinite"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_codes("z", bad)
    with pytest.raises(ConfigError, match=r"^z: got 3 concepts, expected 4$"):
        check_codes("z", SparseCodes(good, torch.zeros(2, 1, dtype=torch.int64), 3), 4)
    with pytest.raises(ConfigError, match=r"^text_codes: got 3 rows beside 2 image codes, expected one per pair$"):
        check_pairs(torch.ones(2, 4), torch.ones(3, 4))
    with pytest.raises(ConfigError, match=r"^text_codes: got shape \(2, 5\), expected \(rows, 4\)$"):
        check_pairs(torch.ones(2, 4), torch.ones(2, 5))
