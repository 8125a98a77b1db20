"""Sparse decoding: value and all three gradients equal those of the dense product."""

import pytest
import torch
from effml_eval.sae import native
from effml_eval.sae.sparse_codes import SparseCodes
from effml_eval.sae.sparse_decode import sparse_decode
from effml_shared.errors import ConfigError


@pytest.fixture(params=["native", "plain"])
def path(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(native, "serves", lambda *tensors: False)
    return request.param


def case(shape, concepts, dim, dtype, repeat=False):
    g = torch.Generator().manual_seed(3)
    values = torch.rand(shape, generator=g).to(dtype).requires_grad_()
    order = torch.rand(*shape[:-1], concepts, generator=g).argsort(-1)[..., : shape[-1]]
    indices = torch.zeros(shape, dtype=torch.int64) if repeat else order
    return values, indices, torch.randn(concepts, dim, generator=g).to(dtype).requires_grad_()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)]
)
@pytest.mark.parametrize("shape", [(6, 3), (6, 1), (6, 8), (2, 3, 4), (0, 3), (5,)])
@pytest.mark.parametrize("repeat", [False, True])
def test_equals_the_dense_product(path, dtype, tolerance, shape, repeat):
    values, indices, dictionary = case(shape, 8, 21, dtype, repeat)
    out = sparse_decode(values, indices, dictionary)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    got = [out, *torch.autograd.grad(out, (values, dictionary), upstream)]
    wide = values.detach().double().requires_grad_(), dictionary.detach().double().requires_grad_()
    dense = SparseCodes(wide[0], indices, 8).dense() @ wide[1]
    expected = [dense, *torch.autograd.grad(dense, wide, upstream.double())]
    for a, b in zip(got, [e.detach() for e in expected], strict=True):
        a = a.detach()
        assert a.dtype == dtype
        scale = float(b.abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * scale)


def test_finite_differences(path):
    values, indices, dictionary = case((4, 3), 6, 5, torch.float64)
    with torch.no_grad():
        values[0, 1] = 0.0  # an entry of value 0 has a gradient, unless it is declared inert
    assert torch.autograd.gradcheck(lambda v, d: sparse_decode(v, indices, d), (values, dictionary))
    grads = [
        torch.autograd.grad(sparse_decode(values, indices, dictionary, inert_zeros=inert).sum(), values)[0]
        for inert in (False, True)
    ]
    assert grads[0][0, 1] != 0
    assert grads[1][0, 1] == 0
    assert torch.equal(grads[0] * (values.detach() != 0), grads[1])


def test_second_derivatives_are_refused():
    values, indices, dictionary = case((4, 3), 6, 5, torch.float64)
    (grad,) = torch.autograd.grad(sparse_decode(values, indices, dictionary).square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable"):
        grad.sum().backward()


def test_bad_arguments_are_refused():
    values, indices, dictionary = case((4, 3), 6, 5, torch.float64)
    with pytest.raises(ConfigError, match=r"indices: got -1 to .*, expected integers in \[0, 6\)"):
        sparse_decode(values, indices.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(-1)), dictionary)
    with pytest.raises(ConfigError, match=r"indices: got .* to 6"):
        sparse_decode(values, indices.clamp(max=4) + 2, dictionary)
    with pytest.raises(ConfigError, match=r"got shapes"):
        sparse_decode(values[:, :2], indices, dictionary)
    with pytest.raises(ConfigError, match=r"expected one floating dtype"):
        sparse_decode(values.float(), indices, dictionary)
    with pytest.raises(ConfigError, match=r"expected one floating dtype"):
        sparse_decode(values.long(), indices, dictionary.long())
    with pytest.raises(ConfigError, match=r"int64 indices"):
        sparse_decode(values, indices.int(), dictionary)


@pytest.mark.parametrize("shape", [(3, 0), (0, 0), (2, 3, 0), (0,)])
@pytest.mark.parametrize("inert", [False, True])
def test_codes_without_entries_decode_to_zeros(path, shape, inert):
    values, indices, dictionary = case(shape, 4, 5, torch.float64)
    out = sparse_decode(values, indices, dictionary, inert_zeros=inert)
    assert torch.equal(out, torch.zeros(*shape[:-1], 5, dtype=torch.float64))
    out.sum().backward()
    assert values.grad.shape == shape
    assert torch.equal(dictionary.grad, torch.zeros(4, 5, dtype=torch.float64))
    codes = SparseCodes(values, indices, 4)
    assert codes.to_coo()._nnz() == 0
    assert codes.dense().shape == (*shape[:-1], 4)
