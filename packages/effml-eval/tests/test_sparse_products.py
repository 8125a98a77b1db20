"""The three products against dense ones, on both paths."""

import pytest
import torch
from effml_eval.sae import native, sparse_products
from effml_eval.sae.sparse_codes import SparseCodes
from effml_eval.sae.sparse_products import concept_sums, pair_dots, weighted_sums


@pytest.fixture(params=["native", "plain"])
def path(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(native, "serves", lambda *tensors: False)
        monkeypatch.setattr(sparse_products, "_GATHERED", 64)  # so that chunks are short
    return request.param


def case(rows, k, concepts, dim, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, k, generator=g).to(dtype) * (torch.rand(rows, k, generator=g) < 0.8)
    indices = torch.randint(concepts, (rows, k), generator=g)
    return (
        values,
        indices,
        torch.randn(concepts, dim, generator=g).to(dtype),
        torch.randn(rows, dim, generator=g).to(dtype),
    )


SIZES = [(5, 3, 7, 4), (1, 1, 1, 1), (9, 6, 4, 67), (3, 9, 50, 130), (40, 5, 3, 33), (0, 3, 4, 5), (4, 0, 3, 5)]


@pytest.mark.parametrize("size", SIZES)
def test_products_are_the_dense_ones(path, size):
    values, indices, table, rows = case(*size)
    dense = SparseCodes(values, indices, len(table)).dense()
    torch.testing.assert_close(weighted_sums(values, indices, table), dense @ table, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(concept_sums(values, indices, rows, len(table)), dense.T @ rows, rtol=1e-12, atol=1e-12)
    dots = (rows @ table.T).gather(1, indices)
    torch.testing.assert_close(pair_dots(rows, table, indices), dots, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pair_dots(rows, table, indices, values), dots * (values != 0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision(path, dtype, tolerance):
    values, indices, table, rows = case(12, 4, 20, 48, dtype)
    dense = SparseCodes(values.double(), indices, len(table)).dense()
    for got, expected in (
        (weighted_sums(values, indices, table), dense @ table.double()),
        (concept_sums(values, indices, rows, 20), dense.T @ rows.double()),
        (pair_dots(rows, table, indices), (rows.double() @ table.double().T).gather(1, indices)),
    ):
        assert got.dtype == dtype
        assert float((got.double() - expected).norm() / expected.norm()) < tolerance


def test_threads_and_strides_change_no_bit():
    values, indices, table, rows = case(33, 7, 15, 40, torch.float32)
    strided = table.T.contiguous().T
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            sums = weighted_sums(values, indices, strided), concept_sums(values, indices, rows, 15)
            results.append([*sums, pair_dots(rows, strided, indices)])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
