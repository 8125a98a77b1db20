"""Rounding: the layer in float32, under bfloat16 autocast and on a GPU against float64, and two runs bit by bit."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from effml_arch.recurrent.layer import RecurrentTransformerConfig, RecurrentTransformerLayer
from torch import Tensor

VARIANTS: dict[str, dict[str, Any]] = {
    "rope": {"position": "rope", "qk_norm": "head", "n_kv_heads": 2},
    "alibi": {"position": "alibi", "qk_norm": "full", "norm": "layer", "mlp": "gelu"},
}


@pytest.fixture(params=VARIANTS)
def layer(request: pytest.FixtureRequest) -> RecurrentTransformerLayer:
    torch.manual_seed(0)
    config = RecurrentTransformerConfig(n_layers=1, d_model=64, n_heads=4, d_ff=256, **VARIANTS[request.param])
    return RecurrentTransformerLayer(config)


def passes(layer: RecurrentTransformerLayer, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """Return the output (4, 200, 64) and all gradients of a layer in a type."""
    layer = deepcopy(layer).to(device, dtype)
    x = torch.randn(4, 200, 64, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
    weight = torch.randn(4, 200, 64, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    z = layer(x)
    wanted = {"x": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad((z * weight).sum(), list(wanted.values()))
    return {"output": z.detach(), **dict(zip(wanted, gradients, strict=True))}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], output: float, gradient: float) -> None:
    """Compare in relative L2, tensor by tensor."""
    for name, exact in expected.items():
        error = (got[name].cpu().double() - exact).norm() / exact.norm()
        assert error <= (output if name == "output" else gradient), (name, float(error))


def test_float32(layer: RecurrentTransformerLayer) -> None:
    assert_close(passes(layer, torch.float32), passes(layer, torch.float64), 1e-5, 1e-4)


def test_bfloat16_autocast(layer: RecurrentTransformerLayer) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        got = passes(layer, torch.float32)
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}
    assert_close(got, passes(layer, torch.float64), 1e-2, 3e-2)


def test_two_runs_are_equal_bit_by_bit(layer: RecurrentTransformerLayer) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        first, second = passes(layer, dtype), passes(layer, dtype)
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(layer: RecurrentTransformerLayer) -> None:
    expected = passes(layer, torch.float64)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        got, again = passes(layer, torch.float32, "cuda"), passes(layer, torch.float32, "cuda")
        with torch.autocast("cuda", torch.bfloat16):
            low = passes(layer, torch.float32, "cuda")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert_close(got, expected, 1e-5, 1e-4)
    assert all(torch.equal(got[name], again[name]) for name in got)
    assert_close(low, expected, 1e-2, 3e-2)
