"""Softmax attention in pieces: running maximum, denominator and numerator of every query.

Merging a set of keys with logits s_j and values v_j into a query's state (m, l, o):

    m' = max(m, max_j s_j);   o <- e^(m - m') o + sum_j e^(s_j - m') v_j;   l <- e^(m - m') l + sum_j e^(s_j - m')

after which attention is o / l and its log-sum-exp m + log l. A state begins with the query's own pair, so that m is
always finite and keys that are all hidden change nothing. State: head_dim + 2 numbers per query. Cost of a merge:
4 head_dim FLOPs per pair. Source: online softmax, arXiv 1805.02867.

Layout: the queries that share a key head are neighbouring rows, so that grouped queries need neither repeated keys nor
sums over a group: queries (batch x kv_heads, seq x group, head_dim), keys (batch x kv_heads, seq, head_dim).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from effml_arch.recurrent.pair_bias import PairBias, add_bias
from effml_arch.recurrent.schedule import Tile

__all__ = ["AttentionState", "Geometry", "group_queries", "merge_tile", "pieces", "tile_logits", "ungroup_queries"]

MAX_LOGITS = 1 << 20  # that exist at once, over all heads: 4 MiB in float32, whatever the size of a tile


def group_queries(q: Tensor, kv_heads: int) -> Tensor:
    """Return q (batch, heads, seq, head_dim) as rows by key head: (batch x kv_heads, seq x group, head_dim)."""
    return q.unflatten(1, (kv_heads, -1)).transpose(2, 3).flatten(2, 3).flatten(0, 1).contiguous()


def ungroup_queries(rows: Tensor, batch: int, group: int) -> Tensor:
    """Undo `group_queries`: (batch x kv_heads, seq x group, head_dim) -> (batch, heads, seq, head_dim)."""
    return rows.unflatten(1, (-1, group)).unflatten(0, (batch, -1)).transpose(2, 3).flatten(1, 2)


class Geometry(NamedTuple):
    """How rows and slots are counted."""

    batch: int
    group: int  # query heads per key head
    slot: int  # of the first query: the tokens in the cache


@dataclass
class AttentionState:
    """Running softmax of queries (batch x kv_heads, rows, ...), updated in place."""

    maximum: Tensor  # (.., rows, 1)
    denominator: Tensor  # (.., rows, 1), relative to e^maximum
    numerator: Tensor  # (.., rows, head_dim), likewise

    @classmethod
    def of_own_pair(cls, q: Tensor, k: Tensor, v: Tensor, group: int) -> AttentionState:
        """Return the state of q (.., seq x group, dim), already scaled, having seen its own k and v (.., seq, dim)."""
        own = (q.unflatten(1, (-1, group)) * k[:, :, None]).sum(-1).flatten(1)[..., None]
        value = v.repeat_interleave(group, dim=1) if group > 1 else v.clone()  # written in place below
        return cls(own, torch.ones_like(own), value)

    def merge(self, rows: slice, logits: Tensor, values: Tensor) -> None:
        """Take in keys: logits (.., rows, keys), which are overwritten, and values (.., keys, head_dim)."""
        old, total, sums = self.maximum[:, rows], self.denominator[:, rows], self.numerator[:, rows]
        new = torch.maximum(old, logits.amax(-1, keepdim=True))
        decay = (old - new).exp_()
        weights = logits.sub_(new).exp_()
        total.mul_(decay).add_(weights.sum(-1, keepdim=True))
        sums.mul_(decay).add_(weights @ values)
        old.copy_(new)

    def output(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return attention (.., rows, head_dim) and its log-sum-exp (.., rows, 1)."""
        total = self.denominator[:, rows]
        return self.numerator[:, rows] / total, self.maximum[:, rows] + total.log()


def pieces(tile: Tile, heads: int, oldest: int = 0) -> Iterator[Tile]:
    """Cut a tile into parts of at most `MAX_LOGITS` pairs over this many rows of heads (but one query and 256 keys).

    oldest: keys before this one are left out, all queries being out of their sight.
    """
    keys = max(256, MAX_LOGITS // (heads * min(64, max(1, tile.q1 - tile.q0))))
    for k0 in range(max(tile.k0, oldest), tile.k1, keys):
        k1 = min(k0 + keys, tile.k1)
        queries = max(1, MAX_LOGITS // (heads * (k1 - k0)))
        for q0 in range(tile.q0, tile.q1, queries):
            yield Tile(q0, min(q0 + queries, tile.q1), k0, k1)


def tile_logits(q: Tensor, k: Tensor, tile: Tile, bias: PairBias, geometry: Geometry, past: bool = False) -> Tensor:
    """Return the biased logits (.., queries x group, keys) of a tile of q, already scaled, and k.

    past: the keys are those of the cache, which occupy the slots before the first query.
    """
    batch, group, slot = geometry
    logits = q[:, tile.q0 * group : tile.q1 * group] @ k[:, tile.k0 : tile.k1].mT
    first = 0 if past else slot
    queries, keys = range(slot + tile.q0, slot + tile.q1), range(first + tile.k0, first + tile.k1)
    return add_bias(logits, bias.tile(queries, keys, logits), batch, group)


def merge_tile(
    state: AttentionState, q: Tensor, k: Tensor, v: Tensor, tile: Tile, bias: PairBias, geometry: Geometry, past: bool
) -> None:
    """Merge the keys of a tile into the state of its queries; the arguments are those of `tile_logits`."""
    oldest = bias.oldest(geometry.slot + tile.q0) - (0 if past else geometry.slot)
    for piece in pieces(tile, k.shape[0] * geometry.group, oldest):
        logits = tile_logits(q, k, piece, bias, geometry, past)
        state.merge(slice(piece.q0 * geometry.group, piece.q1 * geometry.group), logits, v[:, piece.k0 : piece.k1])
