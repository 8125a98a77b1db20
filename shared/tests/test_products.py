"""Products by the other library equal PyTorch's own, forward and backward, and nothing stays replaced."""

import warnings

import pytest
import torch
from effml_shared import products
from effml_shared.products import fast_products, matmul

SHAPES = [(512, 64, 96), (96, 512, 64), (1024, 33, 65), (1, 700, 700), (700, 700, 1), (3, 2, 5), (0, 8, 8), (8, 0, 8)]


@pytest.fixture(params=[True, False], ids=["onednn", "default"])
def onednn(request, monkeypatch):
    """Both choices on any machine, as far as its PyTorch has both libraries."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(products, "prefers_onednn", lambda: request.param)
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["rows", "a columns", "b columns", "strided"])
def test_matmul_is_the_float64_product(onednn, shape, layout):
    rows, depth, columns = shape
    stream = torch.Generator().manual_seed(rows + columns)
    a, b = torch.randn(rows, depth, generator=stream), torch.randn(depth, columns, generator=stream)
    if layout == "a columns":
        a = a.t().contiguous().t()
    elif layout == "b columns":
        b = b.t().contiguous().t()
    elif layout == "strided":
        a, b = torch.cat([a, a], 1)[:, :depth], torch.cat([b, b], 1)[:, :columns]
    found = matmul(a, b)
    assert found.shape == (rows, columns)
    assert found.is_contiguous()
    torch.testing.assert_close(found.double(), a.double() @ b.double(), atol=1e-4, rtol=1e-5)


def test_other_types_and_shapes_are_pytorchs(onednn):
    a = torch.randn(200, 300, dtype=torch.float64)
    assert torch.equal(matmul(a, a.t()), a @ a.t())
    whole = torch.arange(90_000).view(300, 300)
    assert torch.equal(matmul(whole, whole), whole @ whole)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        matmul(torch.randn(600, 700), torch.randn(600, 700))


@pytest.mark.parametrize("bias", [True, False])
def test_layers_and_gradients_within(onednn, bias):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(128, 256, bias=bias), torch.randn(4, 64, 128, requires_grad=True)

    def gradients():
        layer.zero_grad()
        x.grad = None
        layer(x).square().sum().backward()
        return [x.grad, *(p.grad.clone() for p in layer.parameters())]

    before = gradients()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fast_products(), fast_products():
            within = gradients()
        after = gradients()
    for a, b, c in zip(before, within, after, strict=True):
        torch.testing.assert_close(b, a, atol=1e-3, rtol=1e-5)
        assert torch.equal(a, c)


def test_scaled_addmm_within(onednn):
    a, b, c = torch.randn(100, 200), torch.randn(200, 50), torch.randn(50)
    with fast_products():
        found = torch.addmm(c, a, b, beta=0.5, alpha=2.0)
    torch.testing.assert_close(found, 0.5 * c + 2.0 * (a @ b), atol=1e-4, rtol=1e-5)


def test_an_error_inside_restores(onednn):
    with pytest.raises(ValueError, match="mine"), fast_products():
        raise ValueError("mine")
    assert products._users == 0
    assert products._library is None
