"""The forward pass of a recurrent layer: positions one by one, earlier blocks of keys by tiles.

    queries, own pairs of all positions: in parallel, by the caller
    per block of positions: merge the tiles that begin here; then for each position t of the block
        a_t = attention over {what was merged, the persistent keys of the block before t}
        z_t = x_t + rho W_o a_t + rho MLP(...);   (k_t, v_t) = key and value of the source (1 - mu) x_t + mu z_t

Within a block the state of what was merged counts as one more key, with its log-sum-exp as logit and its output as
value: one product, one softmax and one product per position. State: keys, values, attention heads and outputs of all
positions. FLOPs are those of attention over all pairs, key rows read those of `effml_arch.recurrent.schedule`.
Source: the Recurrent Transformer, arXiv 2604.21215, sections 2 and 5; blocks and the mixed source are our own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from effml_arch.recurrent import kernels
from effml_arch.recurrent.attention_state import AttentionState, Geometry, merge_tile
from effml_arch.recurrent.folding import FoldedBlock
from effml_arch.recurrent.native import NativeForward, serves
from effml_arch.recurrent.pair_bias import PairBias, add_bias
from effml_arch.recurrent.schedule import Tile

__all__ = ["Queries", "Scan", "scan"]


class Queries(NamedTuple):
    """What a layer computes of its input in parallel; rows as in `effml_arch.recurrent.attention_state`."""

    q: Tensor  # (batch x kv_heads, seq x group, head_dim), divided by sqrt(head_dim)
    own_k: Tensor  # (batch x kv_heads, seq, head_dim): the pair a position reads of itself
    own_v: Tensor


class Scan(NamedTuple):
    """The result of a forward pass over seq positions."""

    z: Tensor  # (seq, batch, d_model): the layer's output
    heads: Tensor  # (seq, batch, d_model): attention before W_o
    keys: Tensor  # (batch x kv_heads, seq, head_dim): persistent, as are the values
    values: Tensor
    lse: Tensor | None  # (batch x kv_heads, seq x group, 1): log-sum-exp of the logits, if asked for


def scan(
    block: FoldedBlock,
    x: Tensor,
    queries: Queries,
    bias: PairBias,
    geometry: Geometry,
    *,
    rotary: tuple[Tensor, Tensor] | None,
    past: tuple[Tensor, Tensor] | None,
    write_mix: float,
    base_block: int,
    tiles: dict[int, Tile],
    with_lse: bool,
    kept: Tensor | None = None,
) -> Scan:
    """Run a layer over x (seq, batch, d_model).

    Args:
        past: keys and values of the cache (batch x kv_heads, slots, head_dim).
        tiles: a `schedule` for this base block.
        kept: (seq, 2, batch, d_model), False where dropout leaves out what attention, and what the MLP, adds.
    """
    (n, batch, _), group = x.shape, geometry.group
    q, own_k, own_v = queries
    merge = kernels.merge_tile if kernels.serves(q) else merge_tile
    state = AttentionState.of_own_pair(q, own_k, own_v, group)
    if past is not None:
        whole = Tile(0, n, 0, past[0].shape[1])
        merge(state, q, *past, whole, bias, geometry, past=True)
    keys, values, z, heads = (torch.empty_like(t) for t in (own_k, own_v, x, x))
    lse = torch.empty_like(state.maximum) if with_lse else None
    tables = block.key_tables(rotary, x)
    native = None
    if serves(block, x, *queries):
        written = {"z": z, "heads": heads, "keys": keys, "values": values, "lse": lse}
        native = NativeForward(block, x, q, bias, geometry, state, tables, kept, write_mix, written)
    # Of one block, with a zero before its keys: the key of what was merged, whose logit is its log-sum-exp.
    block_keys = own_k.new_zeros(len(own_k), base_block + 1, block.head_dim)
    block_values = torch.empty_like(block_keys[:, 1:])
    for start in range(0, n, base_block):
        stop = min(start + base_block, n)
        if native is not None:
            if start in tiles:
                native.merge(tiles[start])
            native.run(start, stop)
            continue
        if start in tiles:
            merge(state, q, keys, values, tiles[start], bias, geometry, past=False)
        rows, size = slice(start * group, stop * group), stop - start
        merged, merged_lse = state.output(rows)
        logit_bias = block_bias(merged_lse, start, size, bias, geometry)
        steps = (
            logit_bias.unflatten(1, (size, group)).unbind(1),
            q[:, rows].unflatten(1, (size, group)).unbind(1),
            merged.unflatten(1, (size, group)).unbind(1),
            x[start:stop].unbind(),
            _positions(tables[0], start, stop),
            _positions(tables[1], start, stop),
            block_keys[:, 1:].unbind(1),
            block_values.unbind(1),
            [None] * size if kept is None else kept[start:stop].to(x.dtype).unbind(),
        )
        block_heads, block_z = [], []
        for i, (logits_i, q_i, merged_i, x_i, cos_i, sin_i, k_i, v_i, kept_i) in enumerate(zip(*steps, strict=False)):
            a = merged_i
            if i:
                logits = torch.baddbmm(logits_i[..., : i + 1], q_i, block_keys[:, : i + 1].mT)
                weights = logits.softmax(-1)
                a = torch.bmm(weights[..., 1:], block_values[:, :i]).addcmul_(weights[..., :1], merged_i)
            a = a.reshape(batch, -1)
            z_i = block.finish(x_i, a, kept_i)
            block.persist(z_i if write_mix == 1 else torch.lerp(x_i, z_i, write_mix), (cos_i, sin_i), k_i, v_i)
            block_heads.append(a)
            block_z.append(z_i)
        torch.stack(block_heads, out=heads[start:stop])
        torch.stack(block_z, out=z[start:stop])
        keys[:, start:stop] = block_keys[:, 1 : size + 1]
        values[:, start:stop] = block_values[:, :size]
        if lse is not None:
            logits = torch.baddbmm(logit_bias, q[:, rows], block_keys[:, :size].mT)
            lse[:, rows] = logits.logsumexp(-1, keepdim=True)
    return Scan(z, heads, keys, values, lse)


def block_bias(first: Tensor, start: int, size: int, bias: PairBias, geometry: Geometry) -> Tensor:
    """Return `first` (.., size x group, 1), then the bias of a block's first size - 1 keys, -inf at later positions."""
    rows, group, slot = first.shape[1], geometry.group, geometry.slot + start
    later = torch.ones(size, size - 1, dtype=torch.bool, device=first.device).triu()
    mask = first.new_zeros(size, size - 1).masked_fill_(later, -math.inf).repeat_interleave(group, dim=0)
    logits = mask.expand(first.shape[0], rows, size - 1).contiguous()
    tile = bias.tile(range(slot, slot + size), range(slot, slot + size - 1), first) if size > 1 else None
    return torch.cat([first, add_bias(logits, tile, geometry.batch, group)], dim=-1)


def _positions(table: Tensor | None, start: int, stop: int) -> list[Tensor | None]:
    if table is None or table.shape[0] == 1:
        return [None if table is None else table[0]] * (stop - start)
    return list(table[start:stop].unbind())
