"""The Triton tiles equal the plain ones: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from effml_arch.recurrent import attention_state, kernels, tiled, tiled_backward
from effml_arch.recurrent.attention_state import AttentionState, Geometry, group_queries
from effml_arch.recurrent.layer import RecurrentTransformerConfig, RecurrentTransformerLayer
from effml_arch.recurrent.pair_bias import PairBias, add_bias
from effml_arch.recurrent.schedule import Tile
from torch import Tensor

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_triton = pytest.mark.skipif(kernels.triton is None, reason="triton comes with torch's CUDA wheels")


def problems() -> Iterator[dict[str, Any]]:
    """Yield tiles of odd sizes with every kind of bias: batch 2, 2 key heads."""
    for group, dim, tile, slot, past in (
        (1, 8, Tile(3, 4, 0, 3), 0, False),
        (2, 24, Tile(40, 77, 9, 40), 0, False),
        (3, 64, Tile(65, 90, 0, 65), 0, False),
        (1, 100, Tile(0, 5, 0, 21), 21, True),
    ):
        slots = slot + max(tile.q1, tile.k1)
        valid = torch.rand(2, slots, generator=torch.Generator().manual_seed(0)) > 0.3
        documents = torch.arange(slots).div(30, rounding_mode="floor").expand(2, -1)
        heads = 2 * group
        for fields in (
            {"alibi_heads": heads} if group == 1 else {},
            {"key_valid": valid, "window": 11},
            {"alibi_heads": heads, "doc_ids": documents, "window": 10**12},
        ):
            bias = PairBias(**fields)
            yield {"dim": dim, "tile": tile, "bias": bias, "geometry": Geometry(2, group, slot), "past": past}


def tensors(problem: dict[str, Any], device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v: k and v are parts of larger buffers."""
    stream, tile, geometry = torch.Generator().manual_seed(1), problem["tile"], problem["geometry"]
    q = torch.randn(2, 2 * geometry.group, tile.q1, problem["dim"], generator=stream) * 0.3
    pairs = torch.randn(2, 4, max(tile.k1, 3) + 5, problem["dim"], generator=stream)
    k, v = pairs.to(device, dtype)[:, :, : tile.k1]
    return group_queries(q.to(device, dtype), 2), k, v


def on(bias: PairBias, device: str) -> PairBias:
    moved = {
        name: None if t is None else t.to(device)
        for name, t in (("key_valid", bias.key_valid), ("doc_ids", bias.doc_ids))
    }
    return PairBias(bias.alibi_heads, window=bias.window, **moved)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    assert (got.double().cpu() - expected).norm() <= tolerance * expected.norm()


def check(problem: dict[str, Any], device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Compare both kernels with the definition in float64, and with themselves."""
    tile, geometry = problem["tile"], problem["geometry"]
    q, k, v = tensors(problem, device, dtype)
    bias, wide = on(problem["bias"], device), [t.double().cpu() for t in (q, k, v)]
    group, dim = geometry.group, problem["dim"]
    own_k, own_v = torch.randn(2, 4, tile.q1, dim, generator=torch.Generator().manual_seed(2))
    states = []
    for _ in range(2 if device == "cuda" else 1):  # the interpreter has no races
        state = AttentionState.of_own_pair(q.float(), own_k.to(device), own_v.to(device), group)
        kernels.merge_tile(state, q, k, v, tile, bias, geometry, problem["past"])
        states.append(state)
    expected = AttentionState.of_own_pair(wide[0], own_k.double(), own_v.double(), group)
    attention_state.merge_tile(expected, wide[0], wide[1], wide[2], tile, problem["bias"], geometry, problem["past"])
    for name in ("maximum", "denominator", "numerator"):
        close(getattr(states[0], name), getattr(expected, name), tolerance)
        assert torch.equal(getattr(states[0], name), getattr(states[-1], name)), name
    if not problem["past"]:
        lse = expected.maximum + expected.denominator.log()
        check_cotangents(problem, (q, k, v), lse, tolerance)


def check_cotangents(
    problem: dict[str, Any], qkv: tuple[Tensor, Tensor, Tensor], lse: Tensor, tolerance: float
) -> None:
    tile, geometry, (q, k, v) = problem["tile"], problem["geometry"], qkv
    stream, device = torch.Generator().manual_seed(3), q.device.type
    g = torch.randn(*q.shape[:2], q.shape[2] + 1, generator=stream)
    start = [torch.randn(t.shape, generator=stream) for t in (q, k, v)]
    results = []
    for _ in range(2 if device == "cuda" else 1):  # the interpreter has no races
        out = dq, dk, dv = [t.clone().to(device) for t in start]
        bias = on(problem["bias"], device)
        kernels.tile_cotangents(q, k, v, g.to(device), lse.float().to(device), dq, dk, dv, tile, bias, geometry)
        results.append(out)

    rows, at = slice(tile.q0 * geometry.group, tile.q1 * geometry.group), slice(tile.k0, tile.k1)
    q, k, v, dq, dk, dv = (t.double().cpu() for t in (q, k, v, *start))
    g = g.double()[:, rows]
    logits = q[:, rows] @ k[:, at].mT
    queries, keys = range(tile.q0, tile.q1), range(tile.k0, tile.k1)
    add_bias(logits, problem["bias"].tile(queries, keys, logits), 2, geometry.group)
    p = (logits - lse[:, rows]).exp()
    ds = p * (g[..., :-1] @ v[:, at].mT + g[..., -1:])
    dv[:, at] += p.mT @ g[..., :-1]
    dk[:, at] += ds.mT @ q[:, rows]
    dq[:, rows] += ds @ k[:, at]
    for got, again, expected in zip(results[0], results[-1], (dq, dk, dv), strict=True):
        close(got, expected, tolerance)
        assert torch.equal(got, again)


def check_layer(device: str, patch: pytest.MonkeyPatch) -> None:
    """Compare a whole layer, forward and backward, with the naive one in float64; count that the kernels ran."""
    runs = {"merge_tile": 0, "tile_cotangents": 0}

    def counting(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def counted(*given: Any, **named: Any) -> None:
            runs[name] += 1
            kernel(*given, **named)

        return counted

    for name in runs:
        patch.setattr(kernels, name, counting(name, getattr(kernels, name)))
    config = RecurrentTransformerConfig(
        n_layers=1,
        d_model=24,
        n_heads=4,
        n_kv_heads=2,
        d_ff=16,
        position="alibi",
        qk_norm="head",
        window=9,
        base_block=4,
    )
    torch.manual_seed(0)
    layer = RecurrentTransformerLayer(config).to(device)
    x = torch.randn(2, 15, 24, device=device, requires_grad=True)
    mask = torch.ones(2, 15, device=device)
    mask[0, :3] = 0
    results = []
    for backend, schedule, dtype in (
        ("naive", "tile", torch.float64),
        ("tiled", "tile", None),
        ("tiled", "pull", None),
    ):
        layer.backend, layer.schedule = backend, schedule
        layer.to(dtype or torch.float32)
        z = layer(x.to(dtype or torch.float32), attention_mask=mask)
        results.append([z, *torch.autograd.grad(z.square().sum(), [x, *layer.parameters()])])
    for expected, *others in zip(*results, strict=True):
        for got in others:
            assert (got - expected).norm() <= 1e-5 * max(1.0, expected.norm().item())
    assert runs == {"merge_tile": 6, "tile_cotangents": 6}


def interpret() -> None:
    """Check the kernels as Triton's interpreter runs them, on CPU tensors: a process of its own decides that."""
    for problem in problems():
        check(problem, "cpu", torch.float32, 1e-6)
    check(problem, "cpu", torch.float16, 2e-3)  # the interpreter multiplies the bits of bfloat16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "serves", lambda q: q.dtype == torch.float32)
        for module in (tiled, tiled_backward):
            patch.setattr(module, "serves", lambda *given: False)  # the C path of a CPU has its own tiles
        check_layer("cpu", patch)


@needs_triton
def test_interpreted_kernels_equal_the_plain_version() -> None:
    code = f"import runpy; runpy.run_path({__file__!r})['interpret']()"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_tensors_of_a_cpu_or_in_float64_are_left_to_the_plain_version() -> None:
    assert not kernels.serves(torch.zeros(1, 1, 8))
    assert not kernels.serves(torch.zeros(1, 1, 8, dtype=torch.float64))


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_kernels_on_the_device_equal_the_plain_version(dtype: torch.dtype, tolerance: float) -> None:
    for problem in problems():
        check(problem, "cuda", dtype, tolerance)
    assert not kernels.serves(torch.zeros(1, 1, 8, dtype=torch.float64, device="cuda"))


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_a_layer_on_the_device_equals_the_naive_one(monkeypatch: pytest.MonkeyPatch) -> None:
    check_layer("cuda", monkeypatch)
