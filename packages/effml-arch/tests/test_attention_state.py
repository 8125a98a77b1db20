from __future__ import annotations

import math

import pytest
import torch
from effml_arch.recurrent import attention_state
from effml_arch.recurrent.attention_state import (
    AttentionState,
    Geometry,
    group_queries,
    merge_tile,
    pieces,
    ungroup_queries,
)
from effml_arch.recurrent.pair_bias import PairBias
from effml_arch.recurrent.schedule import Tile
from torch import Tensor


def parts(n: int = 6, group: int = 2, dim: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    stream = torch.Generator().manual_seed(0)
    shapes = (3, n * group, dim), (3, n, dim), (3, n, dim)
    q, k, v = (torch.randn(shape, generator=stream, dtype=torch.float64) for shape in shapes)
    return q, k, v


def test_merging_in_any_pieces_is_one_softmax() -> None:
    q, k, v = parts()
    past_k, past_v = (torch.randn(3, 11, 4, dtype=torch.float64) for _ in range(2))
    state = AttentionState.of_own_pair(q, k, v, group=2)
    for start, stop in ((0, 1), (1, 8), (8, 11)):
        state.merge(slice(0, 12), q @ past_k[:, start:stop].mT, past_v[:, start:stop])
    out, lse = state.output(slice(0, 12))
    own_k, own_v = (t.repeat_interleave(2, 1) for t in (k, v))
    logits = torch.cat([(q * own_k).sum(-1, keepdim=True), q @ past_k.mT], dim=-1)
    weights = logits.softmax(-1)
    torch.testing.assert_close(out, weights[..., :1] * own_v + weights[..., 1:] @ past_v, rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, logits.logsumexp(-1, keepdim=True), rtol=0, atol=1e-14)


def test_hidden_keys_change_nothing_and_the_values_are_not_written_to() -> None:
    q, k, v = parts(group=1)
    before = v.clone()
    state = AttentionState.of_own_pair(q, k, v, group=1)
    state.merge(slice(0, 6), torch.full((3, 6, 2), -math.inf, dtype=torch.float64), torch.randn(3, 2, 4).double())
    out, _ = state.output(slice(0, 6))
    assert torch.equal(out, before)
    state.merge(slice(0, 6), torch.zeros(3, 6, 2).double(), torch.randn(3, 2, 4).double())
    assert torch.equal(v, before)


def test_grouping_puts_the_heads_of_a_key_head_beside_each_other() -> None:
    q = torch.randn(2, 6, 5, 3)
    rows = group_queries(q, kv_heads=2)
    assert rows.shape == (4, 15, 3)
    assert torch.equal(rows[1, 4 * 3 + 2], q[0, 1 * 3 + 2, 4])
    assert torch.equal(ungroup_queries(rows, batch=2, group=3), q)


@pytest.mark.parametrize("limit", [1, 40, 1 << 20])
def test_pieces_cover_a_tile_and_merge_to_the_same(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_state, "MAX_LOGITS", limit)
    covered = torch.zeros(40, 700)
    for piece in pieces(Tile(3, 40, 5, 700), heads=2):
        covered[piece.q0 : piece.q1, piece.k0 : piece.k1] += 1
    assert covered.sum() == (40 - 3) * (700 - 5)
    assert covered.max() == 1
    q, k, v = parts()
    states = [AttentionState.of_own_pair(q, k, v, group=2) for _ in range(2)]
    merge_tile(states[0], q, k, v, Tile(3, 6, 0, 3), PairBias(), Geometry(3, 2, 0), past=False)
    states[1].merge(slice(6, 12), q[:, 6:] @ k[:, :3].mT, v[:, :3])
    torch.testing.assert_close(states[0].output(slice(0, 12)), states[1].output(slice(0, 12)), rtol=0, atol=1e-14)
