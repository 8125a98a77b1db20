"""Sparse codes against the dense ones they stand for."""

import pytest
import torch
from effml_eval.sae.sparse_codes import SparseCodes
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None)
@given(st.integers(0, 4), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_dense_codes_come_back_from_their_entries(rows, concepts, seed):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randint(-2, 3, (rows, concepts), generator=generator).double()
    codes = SparseCodes.from_dense(dense)
    assert torch.equal(codes.dense(), dense)
    assert torch.equal(codes.to_coo().to_dense(), dense)
    assert codes.to_coo()._nnz() == int((dense != 0).sum())
    assert codes.values.shape[1] == (int((dense != 0).sum(1).max()) if rows else 0)
    assert bool((codes.indices[codes.values == 0] == 0).all())


def test_leading_dimensions_and_repeated_indices():
    codes = SparseCodes(torch.ones(2, 3, 2), torch.ones(2, 3, 2, dtype=torch.int64), 4)
    assert torch.equal(codes.dense(), torch.tensor([0.0, 2.0, 0.0, 0.0]).expand(2, 3, 4))
    assert torch.equal(codes.to_coo().to_dense(), codes.dense().reshape(6, 4))
    assert SparseCodes.from_dense(codes.dense()).values.shape == (2, 3, 1)
    assert SparseCodes.from_dense(torch.tensor([0.0, 3.0])).indices.tolist() == [1]
    with pytest.raises(ConfigError, match=r"codes: got a 0-d tensor"):
        SparseCodes.from_dense(torch.tensor(1.0))


def test_gradients_pass_through_packing_and_unpacking():
    dense = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    (SparseCodes.from_dense(dense).dense() * weight).sum().backward()
    assert torch.equal(dense.grad, weight * (dense.detach() != 0))
    assert not SparseCodes.from_dense(dense).detach().values.requires_grad
