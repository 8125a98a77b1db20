from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from effml_arch.recurrent.layer import RecurrentTransformerConfig, RecurrentTransformerLayer
from torch import Tensor

BASE = RecurrentTransformerConfig(n_layers=2, d_model=16, n_heads=4, d_ff=24, norm_eps=1e-5, residual_scale="depth")


def make(**options: Any) -> RecurrentTransformerLayer:
    torch.manual_seed(0)
    layer = RecurrentTransformerLayer(replace(BASE, **options)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def gradients(layer: RecurrentTransformerLayer, x: Tensor, backend: str, **given: Any) -> dict[str, Tensor]:
    layer.backend = backend
    wanted = {"x": x, **{name: p for name, p in layer.named_parameters() if p.requires_grad}}
    z = layer(x, **given)
    loss = (z * torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z).sin()).sum()
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def assert_equals_naive(layer: RecurrentTransformerLayer, n: int, **given: Any) -> None:
    x = torch.randn(2, n, 16).double().requires_grad_()
    expected, got = (gradients(layer, x, backend, **given) for backend in ("naive", "tiled"))
    for name, gradient in expected.items():
        error, size = (got[name] - gradient).norm().item(), gradient.norm().item()
        assert error <= 1e-11 * (size if size > 1e-10 else 1.0), name  # one position alone: no gradient to queries


@pytest.mark.parametrize("n", [1, 2, 5, 13, 16, 33])
@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_gradients_equal_naive(n: int, position: str, kv_heads: int) -> None:
    qk_norm = ("head", "none", "full")[(n + kv_heads) % 3]
    norm, mlp = ("rms", "layer")[n % 2], ("gelu", "swiglu")[kv_heads % 2]
    layer = make(position=position, n_kv_heads=kv_heads, qk_norm=qk_norm, norm=norm, mlp=mlp, mlp_bias=n > 8)
    layer.schedule, layer.base_block = ("tile", "pull")[kv_heads % 2], (1, 4, 16, 64)[n % 4]
    assert_equals_naive(layer, n)


@pytest.mark.parametrize("kind", ["tile", "pull"])
@pytest.mark.parametrize("base", [1, 4, 16, 64])
def test_masks_windows_and_mixtures(kind: str, base: int) -> None:
    layer = make(position="alibi", window=9, n_kv_heads=2, qk_norm="head", write_mix=0.4)
    layer.schedule, layer.base_block = kind, base
    mask = torch.ones(2, 37)
    mask[0, :6] = 0
    docs = torch.tensor([[0] * 11 + [1] * 26, [0] * 30 + [3] * 7])
    assert_equals_naive(layer, 37, attention_mask=mask, doc_ids=docs)


def test_gradcheck() -> None:
    layer = make(qk_norm="head", n_kv_heads=2, d_model=8, d_ff=5, base_block=2)
    names, values = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(1, 5, 8).double().requires_grad_()

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    # Functional parameters are gone from the layer when the backward pass runs: it must have kept them itself.
    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


def test_frozen_weights_and_single_gradients() -> None:
    layer, x = make(qk_norm="full"), torch.randn(2, 11, 16).double()
    everything = gradients(layer, x.requires_grad_(), "tiled")
    (one,) = torch.autograd.grad((layer(x) * 0 + layer(x)).sum(), [layer.self_attn.k_proj.weight])
    assert one.shape == everything["self_attn.k_proj.weight"].shape
    assert all(parameter.grad is None for parameter in layer.parameters())
    layer.self_attn.k_proj.requires_grad_(False)
    frozen = gradients(layer, x, "tiled")
    assert "self_attn.k_proj.weight" not in frozen
    for name, gradient in frozen.items():
        torch.testing.assert_close(gradient, everything[name], rtol=0, atol=0)
    layer.requires_grad_(False)
    layer.mlp.up_proj.weight.requires_grad_()
    layer(x.detach()).backward(torch.ones(2, 11, 16).double())
    assert layer.mlp.up_proj.weight.grad is not None


def test_a_weight_changed_before_the_backward_pass_is_noticed() -> None:
    layer, x = make(), torch.randn(1, 4, 16).double().requires_grad_()
    loss = layer(x).sum()
    with torch.no_grad():
        layer.self_attn.k_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation"):
        loss.backward()


def test_gradients_under_autocast_are_close() -> None:
    layer, x = make(qk_norm="head").float(), torch.randn(2, 33, 16).requires_grad_()
    expected = gradients(layer, x, "naive")
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(layer, x, "tiled")
    for name, gradient in expected.items():
        assert got[name].dtype == torch.float32
        assert (got[name] - gradient).norm() <= 3e-2 * gradient.norm(), name


@pytest.mark.parametrize("batch", [1, 2])
def test_the_output_may_be_written_to(batch: int) -> None:
    layer, x = make(), torch.randn(batch, 6, 16).double().requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    (got,) = torch.autograd.grad(layer(x).mul_(1.0).add_(7.0).sum(), x)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
