"""The tiled algorithm is the naive loop: all lengths, all combinations of options. Long; a sample is in test_tiled.py.

Lengths up to 130 pass every border of blocks and tiles of a base block of 8; combinations are complete in what decides
which pairs are seen and how they are ordered, and go through the kinds of norm, MLP and mixture beside.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from effml_arch.recurrent.layer import RecurrentTransformerConfig, RecurrentTransformerLayer
from torch import Tensor

pytestmark = pytest.mark.slow

BASE = RecurrentTransformerConfig(n_layers=2, d_model=16, n_heads=4, d_ff=20, norm_eps=1e-5, base_block=8)


def make(**options: Any) -> RecurrentTransformerLayer:
    torch.manual_seed(0)
    layer = RecurrentTransformerLayer(replace(BASE, **options)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def passes(layer: RecurrentTransformerLayer, x: Tensor, backend: str, **given: Any) -> dict[str, Tensor]:
    """Return the output and, if x asks for gradients, all of them."""
    layer.backend = backend
    z = layer(x, **given)
    if not x.requires_grad:
        return {"output": z}
    wanted = {"x": x, **dict(layer.named_parameters())}
    loss = (z * torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z).sin()).sum()
    return {"output": z, **dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))}


def assert_equals_naive(layer: RecurrentTransformerLayer, x: Tensor, **given: Any) -> None:
    with torch.set_grad_enabled(x.requires_grad):
        expected, got = (passes(layer, x, backend, **given) for backend in ("naive", "tiled"))
    torch.testing.assert_close(got.pop("output"), expected.pop("output"), rtol=0, atol=1e-12)
    for name, gradient in expected.items():
        error, size = (got[name] - gradient).norm().item(), gradient.norm().item()
        assert error <= 1e-11 * (size if size > 1e-10 else 1.0), name  # a position alone: no gradient to queries


@pytest.mark.parametrize("schedule", ["tile", "pull"])
@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_outputs_of_every_length(schedule: str, position: str) -> None:
    for n in (*range(1, 131), 255, 256, 257, 1000):
        layer = make(schedule=schedule, position=position, n_kv_heads=(4, 2, 1)[n % 3], base_block=(8, 1, 32)[n % 3])
        assert_equals_naive(layer, torch.randn(2, n, 16).double())


@pytest.mark.parametrize("schedule", ["tile", "pull"])
@pytest.mark.parametrize("n", [7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257])
def test_gradients_of_lengths_around_tiles(schedule: str, n: int) -> None:
    kinds = {"n_kv_heads": (4, 2, 1)[n % 3], "position": ("rope", "alibi")[n % 2], "qk_norm": "head"}
    assert_equals_naive(make(schedule=schedule, **kinds), torch.randn(2, n, 16).double().requires_grad_())


@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("qk_norm", ["none", "full", "head"])
@pytest.mark.parametrize("schedule", ["tile", "pull"])
def test_every_combination(position: str, kv_heads: int, qk_norm: str, schedule: str) -> None:
    fixed = {"position": position, "n_kv_heads": kv_heads, "qk_norm": qk_norm, "schedule": schedule}
    for i, (padded, packed, window, n) in enumerate(product((False, True), (False, True), (None, 6), (11, 27))):
        varied = {
            "norm": ("rms", "layer")[i // 2 % 2],
            "mlp": ("swiglu", "gelu", "relu", "gelu_tanh")[i % 4],
            "mlp_bias": i % 3 == 0,
            "residual_scale": ("none", "depth")[i % 2],
            "write_mix": (1.0, 0.3)[i % 5 == 0],
            "base_block": (4, 5, 16)[i % 3],
        }
        given: dict[str, Any] = {}
        if padded:
            given["attention_mask"] = torch.ones(3, n)
            given["attention_mask"][0, :5], given["attention_mask"][1, : n - 1] = 0, 0
        if packed:
            borders = torch.tensor([[n // 3, n // 2], [1, n - 1], [n // 2, n // 2]])
            given["doc_ids"] = (torch.arange(n)[None, None] >= borders[..., None]).sum(1)
        layer = make(**fixed, **varied, window=window)
        assert_equals_naive(layer, torch.randn(3, n, 16).double().requires_grad_(), **given)


@pytest.mark.parametrize(
    "options",
    [
        {"position": "rope", "qk_norm": "head", "norm": "rms", "mlp": "swiglu", "schedule": "tile"},
        {"position": "alibi", "qk_norm": "full", "norm": "layer", "mlp": "gelu", "schedule": "pull"},
        {"position": "none", "qk_norm": "none", "norm": "layer", "mlp": "swiglu", "write_mix": 0.6},
    ],
)
def test_every_derivative_is_the_difference_quotient(options: dict[str, Any]) -> None:
    layer = make(**{**options, "d_model": 8, "d_ff": 5, "n_kv_heads": 2, "base_block": 2, "window": 4})
    names, values = zip(*layer.named_parameters(), strict=True)
    mask, docs = torch.tensor([[0, 1, 1, 1, 1, 1]]), torch.tensor([[0, 0, 0, 0, 1, 1]])

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, weights, (x,), {"attention_mask": mask, "doc_ids": docs})

    assert torch.autograd.gradcheck(call, (torch.randn(1, 6, 8).double().requires_grad_(), *values))
