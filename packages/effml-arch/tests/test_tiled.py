from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from effml_arch.recurrent import attention_state, tiled
from effml_arch.recurrent.layer import RecurrentTransformerConfig, RecurrentTransformerLayer
from effml_arch.recurrent.schedule import Tile
from torch import Tensor

BASE = RecurrentTransformerConfig(n_layers=1, d_model=16, n_heads=4, d_ff=24, norm_eps=1e-5, base_block=4)


def make(**options: Any) -> RecurrentTransformerLayer:
    torch.manual_seed(0)
    return RecurrentTransformerLayer(replace(BASE, **options)).double().requires_grad_(False)


def both(layer: RecurrentTransformerLayer, x: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    layer.backend = "naive"
    expected = layer(x, **given)
    layer.backend = "tiled"
    return layer(x, **given), expected


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 13, 16, 33])
@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("qk_norm", ["none", "full", "head"])
def test_equals_naive(n: int, position: str, kv_heads: int, qk_norm: str) -> None:
    layer = make(position=position, n_kv_heads=kv_heads, qk_norm=qk_norm, norm="rms" if n % 2 else "layer")
    layer.schedule = ("tile", "pull")[kv_heads % 2]
    torch.testing.assert_close(*both(layer, torch.randn(2, n, 16).double()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["tile", "pull"])
@pytest.mark.parametrize("base", [1, 4, 16, 64])
@pytest.mark.parametrize("grad", [False, True])
def test_every_block_and_schedule_gives_the_same(kind: str, base: int, grad: bool) -> None:
    layer = make(position="alibi", window=9, n_kv_heads=2)
    layer.schedule, layer.base_block = kind, base
    x = torch.randn(2, 37, 16).double().requires_grad_(grad)
    mask = torch.ones(2, 37)
    mask[0, :6] = 0
    docs = torch.tensor([[0] * 11 + [1] * 26, [0] * 30 + [3] * 7])
    torch.testing.assert_close(*both(layer, x, attention_mask=mask, doc_ids=docs), rtol=0, atol=1e-12)


def test_key_rows_read_are_those_of_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, rows, merge = make(schedule="tile", base_block=1), 0, tiled.merge_tile

    def counting(state: Any, q: Any, k: Any, v: Any, tile: Tile, *rest: Any, **named: Any) -> None:
        nonlocal rows
        rows += tile.k1 - tile.k0
        merge(state, q, k, v, tile, *rest, **named)

    monkeypatch.setattr(tiled, "serves", lambda *_: False)
    monkeypatch.setattr(tiled, "merge_tile", counting)
    layer(torch.randn(1, 512, 16).double())
    assert rows == 2304


def test_keys_out_of_the_window_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, read, logits = make(schedule="pull", window=5), [], attention_state.tile_logits

    def counting(q: Any, k: Any, tile: Tile, *rest: Any) -> Tensor:
        read.append(tile.k1 - tile.k0)
        return logits(q, k, tile, *rest)

    monkeypatch.setattr(tiled, "serves", lambda *_: False)
    monkeypatch.setattr(attention_state, "tile_logits", counting)
    layer(torch.randn(1, 41, 16).double())
    assert read == [4] * 10  # blocks of 4 queries, the first of which sees 4 keys back


def test_small_pieces_of_tiles_and_a_batch_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_state, "MAX_LOGITS", 8)
    layer = make(n_heads=1, schedule="tile")
    torch.testing.assert_close(*both(layer, torch.randn(1, 21, 16).double()), rtol=0, atol=1e-12)


def test_float32_is_close_to_float64_and_repeats_bitwise() -> None:
    layer, x = make(qk_norm="head"), torch.randn(4, 256, 16)
    expected = layer(x.double())
    single = layer.float()
    got = single(x)
    assert got.dtype == torch.float32
    assert (got - expected).norm() <= 1e-6 * expected.norm()
    assert torch.equal(single(x), got)
    low = single.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low - expected).norm() <= 2e-2 * expected.norm()
