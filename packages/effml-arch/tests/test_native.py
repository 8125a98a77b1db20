"""The C path equals the eager one, whatever the layer and its sizes, and steps aside where it cannot serve."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from effml_arch.recurrent import native, tiled, tiled_backward
from effml_arch.recurrent.folding import FoldedBlock
from effml_arch.recurrent.layer import RecurrentTransformerConfig, RecurrentTransformerLayer, recurrent_context
from effml_arch.recurrent.schedule import tile_schedule
from effml_shared.kv_cache import KVCache
from effml_shared.layers import ACTIVATIONS
from hypothesis import given, settings
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(not native.is_available(), reason="needs a C compiler: none of cc, gcc, clang found")
BASE = RecurrentTransformerConfig(n_layers=2, d_model=24, n_heads=4, d_ff=40, norm_eps=1e-5, base_block=4)
VARIANTS: dict[str, dict[str, Any]] = {
    "rope": {"norm": "rms", "qk_norm": "head", "mlp": "swiglu", "n_kv_heads": 2},
    "rope-plain": {"norm": "layer", "qk_norm": "none", "mlp": "gelu", "mlp_bias": True, "n_kv_heads": 1},
    "rope-full": {"norm": "layer", "qk_norm": "full", "mlp": "gelu_tanh", "n_kv_heads": 2},
    "alibi": {"position": "alibi", "norm": "layer", "qk_norm": "head", "mlp": "relu", "mlp_bias": True},
    "alibi-grouped": {"position": "alibi", "norm": "rms", "mlp": "gelu", "n_kv_heads": 2, "window": 7},
    "none": {"position": "none", "norm": "rms", "qk_norm": "full", "mlp": "swiglu", "mlp_bias": True},
    "odd": {"position": "none", "d_model": 15, "n_heads": 3, "n_kv_heads": 1, "d_ff": 7, "residual_scale": "depth"},
    "wide": {"d_model": 80, "n_heads": 2, "d_ff": 33, "qk_norm": "head", "mlp": "relu"},
    "mixed": {"write_mix": 0.3, "residual_scale": "depth", "mlp": "gelu"},
    "dropout": {"resid_dropout": 0.4, "mlp": "gelu", "mlp_bias": True, "residual_scale": "depth"},
}


def make(**options: Any) -> RecurrentTransformerLayer:
    torch.manual_seed(0)
    layer = RecurrentTransformerLayer(replace(BASE, **options)).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


@contextmanager
def eager() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (tiled, tiled_backward):
            patch.setattr(module, "serves", lambda *_: False)
        yield


@contextmanager
def only_native() -> Iterator[None]:
    def refuse(*_: Any) -> None:
        raise AssertionError("the eager path was taken")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FoldedBlock, "finish", refuse)
        patch.setattr(tiled_backward.Cotangents, "_rows", refuse)
        yield


def everything(layer: RecurrentTransformerLayer, x: Tensor, **given: Any) -> dict[str, Tensor]:
    """Output and all gradients, under one draw of dropout."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    wanted = {"x": x, **dict(layer.named_parameters())}
    z = layer(x, **given)
    loss = (z * torch.linspace(-1, 1, z.numel(), dtype=z.dtype).view_as(z).sin()).sum()
    return {"z": z.detach(), **dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))}


def assert_equal_paths(layer: RecurrentTransformerLayer, x: Tensor, **given: Any) -> None:
    with eager():
        expected = everything(layer, x, **given)
    with only_native():
        got = everything(layer, x, **given)
    for name, tensor in expected.items():
        error = (got[name] - tensor).abs().max().item()
        assert error <= 1e-12 * max(1.0, tensor.abs().max().item()), name


@pytest.mark.parametrize("name", VARIANTS)
def test_output_and_gradients_equal_the_eager_path(name: str) -> None:
    assert_equal_paths(make(**VARIANTS[name]), torch.randn(3, 21, VARIANTS[name].get("d_model", 24)).double())


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    name=st.sampled_from(sorted(VARIANTS)),
    batch=st.integers(1, 5),
    n=st.integers(4, 40),
    base=st.sampled_from((1, 3, 16, 64)),
    kind=st.sampled_from(("tile", "pull")),
)
def test_any_batch_length_and_block(name: str, batch: int, n: int, base: int, kind: str) -> None:
    layer = make(**VARIANTS[name])
    layer.base_block, layer.schedule = base, kind
    assert_equal_paths(layer, torch.randn(batch, n, layer.config.d_model).double())


@pytest.mark.parametrize("kind", ["tile", "pull"])
def test_tiles_of_many_pieces(kind: str) -> None:
    layer = make(**VARIANTS["alibi-grouped"])
    layer.config, layer.base_block, layer.schedule = replace(layer.config, window=None), 40, kind
    assert_equal_paths(layer, torch.randn(1, 330, 24).double())


def test_masks_documents_and_windows() -> None:
    layer = make(position="alibi", window=9, n_kv_heads=2, qk_norm="head")
    mask = torch.ones(2, 37)
    mask[0, :6] = 0
    docs = torch.tensor([[0] * 11 + [1] * 26, [0] * 30 + [3] * 7])
    x = torch.randn(2, 37, 24).double()
    assert_equal_paths(layer, x, attention_mask=mask)
    assert_equal_paths(layer, x, doc_ids=docs)
    assert_equal_paths(layer, x, attention_mask=mask, doc_ids=docs)


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_after_a_cache_and_from_rows_that_are_not_contiguous(position: str) -> None:
    layer = make(position=position, n_layers=1, n_kv_heads=2, window=11).requires_grad_(False)
    x = torch.randn(24, 30, 2).double().permute(2, 1, 0)
    mask = torch.ones(2, 30)
    mask[1, :3] = 0

    def run() -> tuple[Tensor, ...]:
        cache = KVCache(1, 30)
        halves = [layer(x[:, :13], attention_mask=mask[:, :13], cache=cache)]
        halves.append(layer(x[:, 13:], attention_mask=mask[:, 13:], cache=cache))
        return torch.cat(halves, dim=1), *cache.get(0)

    with eager():
        expected = run()
    with only_native():
        got = run()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(got[0], layer(x, attention_mask=mask), rtol=0, atol=1e-12)


def test_without_norms() -> None:
    layer = make(qk_norm="none")
    for name in ("input_layernorm", "post_attention_layernorm"):
        setattr(layer, name, nn.Identity())
    assert_equal_paths(layer, 0.3 * torch.randn(2, 9, 24).double())


@pytest.mark.parametrize("name", ["rope", "alibi", "none", "wide"])
def test_float32_is_as_close_to_float64_as_the_eager_path_and_repeats_bitwise(name: str) -> None:
    layer, x = make(**VARIANTS[name]), torch.randn(2, 90, VARIANTS[name].get("d_model", 24))
    exact = everything(layer, x.double())
    with eager():
        plain = everything(layer.float(), x)
    first, second = everything(layer, x), everything(layer, x)
    for key, tensor in exact.items():
        assert torch.equal(first[key], second[key])
        size = tensor.norm()
        assert (first[key] - tensor).norm() <= max(2 * (plain[key] - tensor).norm(), 1e-6 * size), key


def test_a_number_that_is_none_spoils_later_positions_only() -> None:
    layer, x = make().float().requires_grad_(False), torch.randn(2, 12, 24)
    expected = layer(x)
    x[0, 5, 3] = torch.nan
    got = layer(x)
    assert torch.equal(got[0, :5], expected[0, :5])
    assert got[0, 5:].isnan().all()
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("name", ["relu", "swiglu", "gelu", "gelu_tanh"])
def test_activations_are_accurate_to_two_units(name: str) -> None:
    special = [0.0, -0.0, 1e-30, -1e-30, 88.0, -88.0, 300.0, -300.0, torch.inf, torch.nan]
    x = torch.cat([torch.linspace(-12, 12, 200_001), torch.tensor(special)])
    expected = ACTIVATIONS[name](x.double())
    kind = native._ACTIVATIONS.index(ACTIVATIONS[name])
    for dtype, units in ((torch.float32, 2.5), (torch.float64, 4.0)):
        got = x.to(dtype, copy=True)
        address, count = ctypes.c_void_p(got.data_ptr()), ctypes.c_int64(len(got))
        library: Any = native._library(dtype)
        library.activate(address, count, ctypes.c_int64(kind))
        # Of x, not of the result: to the left of 0 that is the small difference of two nearly equal numbers.
        error = (got.double() - expected).abs() / x.double().abs().clamp(min=1e-37)
        assert error.nan_to_num(0).max() <= units * torch.finfo(dtype).eps, dtype
        torch.testing.assert_close(got.isnan(), expected.isnan())


def test_tiles_are_those_of_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, seen = make(base_block=4, schedule="tile"), dict[str, list[Any]](merge=[], spread=[])

    def counting(self: Any, function: str, tile: Any) -> None:
        seen[function].append(tile)

    monkeypatch.setattr(native._Kernels, "_pairs", counting)
    everything(layer, torch.randn(1, 29, 24).double())
    tiles = list(tile_schedule(29, 4))
    assert seen == {"merge": tiles, "spread": tiles[::-1]}


def test_without_a_compiler_the_eager_path_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make(), torch.randn(2, 9, 24).double()
    with only_native():
        expected = everything(layer, x)
    monkeypatch.setattr(native, "library", lambda *_, **__: None)
    assert not native.is_available()
    got = everything(layer, x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def test_masks_of_another_size_are_refused() -> None:
    layer, x = make(), torch.randn(2, 9, 24).double()
    context = recurrent_context(layer.config, x[:, :8], attention_mask=torch.ones(2, 8))
    with pytest.raises(RuntimeError, match=r"size"):
        layer(x, context)


def test_steps_aside_for_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = make().float(), torch.randn(9, 2, 24)
    block = FoldedBlock.of(layer, torch.float32)
    assert native.serves(block, x, x)
    for refused in (x.double(), x.bfloat16(), x.to("meta"), x.transpose(0, 1), nn.Parameter(x), x[:, :, ::2]):
        assert not native.serves(block, x, refused)
    assert not native.serves(block, x.to("meta"))
    assert not native.serves(FoldedBlock.of(layer.double(), torch.float64), x)
    many = torch.zeros(1, native.MAX_WORK, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert native.serves(block, many)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not native.serves(block, many)
    assert native.serves(block, x)
    monkeypatch.setattr(native, "MAX_PACKED", 100)
    assert not native.serves(block, x)
    monkeypatch.undo()
    block.activation = torch.tanh
    assert not native.serves(block, x)


@pytest.mark.parametrize(("shape", "columns"), [((3, 5, 70), None), ((2, 1), 8), ((4, 16), 8)])
def test_packed_matrices_are_filled_up_with_zeros(shape: tuple[int, ...], columns: int | None) -> None:
    matrix = torch.randn(shape)
    packed, width = native.pack(matrix, columns), columns or 32
    panels = -(-shape[-1] // width)
    assert packed.shape == (*shape[:-2], panels, shape[-2], width)
    flat = packed.transpose(-3, -2).flatten(-2)
    assert torch.equal(flat[..., : shape[-1]], matrix)
    assert not flat[..., shape[-1] :].any()
