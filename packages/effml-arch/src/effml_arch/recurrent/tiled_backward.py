"""The backward pass of the recurrence: exact, positions in reverse order, tiles in reverse order of the forward pass.

The layer's output and persistent pairs satisfy Z = finish(X, A) and (K, V) = pairs(Z), where A is attention over K, V.
With A and Z known, both are evaluated once more for all positions in parallel, where A and Z count as constants and
ordinary autograd sees weights and inputs. What autograd cannot see is that a position's output feeds later positions,
so `Recurrence` returns the total cotangents of Z, K, V and of the queries and own pairs, found position by position:

    dz_t = dL/dz_t + mu VJP_{w -> k, v}(dk_t, dv_t);   g_t = VJP_{a -> z}(dz_t);   D_t = <g_t, a_t>
    p_ti = exp(s_ti - lse_t);   ds_ti = p_ti (<g_t, v_i> - D_t)
    dv_i += p_ti g_t;   dk_i += ds_ti q_t;   dq_t += ds_ti k_i

dk_t and dv_t are complete when t is reached, since every later query that reads them is done. Then one parallel
backward pass of autograd yields dX and all weight gradients, and with it hooks, frozen weights, DDP and FSDP2 behave as
in any layer. Memory beyond that of a standard layer: O(seq), attention weights being recomputed tile by tile.
Source: the Recurrent Transformer, arXiv 2604.21215; the equations and the split into two passes are derived here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from effml_shared.layers import Block
from torch import Tensor
from torch.autograd.function import once_differentiable

from effml_arch.recurrent.attention_state import Geometry, group_queries, pieces, tile_logits, ungroup_queries
from effml_arch.recurrent.folding import FoldedBlock
from effml_arch.recurrent.linearization import Linearization
from effml_arch.recurrent.pair_bias import PairBias, add_bias
from effml_arch.recurrent.schedule import Tile
from effml_arch.recurrent.tiled import Scan

__all__ = ["Recurrence", "Solved"]


@dataclass
class Solved:
    """A finished forward pass with grouped queries and what it was computed from."""

    layer: Block
    scan: Scan
    bias: PairBias
    geometry: Geometry
    rotary: tuple[Tensor, Tensor] | None
    write_mix: float
    base_block: int
    tiles: dict[int, Tile]
    names: list[str]  # of the weights


class Recurrence(torch.autograd.Function):
    """Return the solved output (batch, seq, d_model); its backward pass is the recurrence's."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        q: Tensor,
        own_k: Tensor,
        own_v: Tensor,
        k: Tensor,
        v: Tensor,
        x: Tensor,
        solved: Solved,
        weights: list[Tensor],
    ) -> Tensor:
        """z, q, own_k, own_v, k, v: as evaluated in parallel; x: (seq, batch, d_model) in the type of the scan."""
        ctx.solved = solved
        ctx.dtypes = [tensor.dtype for tensor in (z, q, own_k, own_v, k, v)]
        ctx.save_for_backward(q, own_k, own_v, x, *weights)
        return solved.scan.z.transpose(0, 1).to(z.dtype, memory_format=torch.contiguous_format, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        q, own_k, own_v, x, *weights = ctx.saved_tensors
        solved: Solved = ctx.solved
        with torch.autocast(x.device.type, enabled=False):
            block = FoldedBlock(solved.layer, dict(zip(solved.names, weights, strict=True)), x.dtype)
            queries = group_queries(q.to(x.dtype), own_k.shape[1]) * block.head_dim**-0.5
            own = [t.to(x.dtype).flatten(0, 1) for t in (own_k, own_v)]
            totals = _Cotangents(solved, block, x, queries, own[0], own[1], dz.to(x.dtype).transpose(0, 1))
            totals.solve()
        batch, group, _ = solved.geometry
        grads = [totals.dz.transpose(0, 1), ungroup_queries(totals.dq.mul_(block.head_dim**-0.5), batch, group)]
        grads += [t.unflatten(0, (batch, -1)) for t in (totals.d_own_k, totals.d_own_v, totals.dk, totals.dv)]
        return *(grad.to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)), None, None, None


class _Cotangents:
    """The total cotangents, filled in from the last block of positions to the first."""

    def __init__(
        self, solved: Solved, block: FoldedBlock, x: Tensor, q: Tensor, own_k: Tensor, own_v: Tensor, dz: Tensor
    ) -> None:
        self.solved, self.block, self.x, self.q, self.own_k, self.own_v = solved, block, x, q, own_k, own_v
        self.dz = dz.clone(memory_format=torch.contiguous_format)
        self.dq = torch.zeros_like(q)
        self.dk, self.dv, self.d_own_k, self.d_own_v = (torch.zeros_like(own_k) for _ in range(4))
        # Rows (g_t, -D_t): their product with (v_i, 1) is <g_t, v_i> - D_t.
        self.g = q.new_zeros(*q.shape[:2], q.shape[2] + 1)
        self.lse = cast(Tensor, solved.scan.lse)
        values = solved.scan.values
        self.values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)

    def solve(self) -> None:
        n, base = len(self.x), self.solved.base_block
        for start in range((n - 1) // base * base, -1, -base):
            self._rows(start, min(start + base, n))
            if start in self.solved.tiles:
                self._tile(self.solved.tiles[start])

    def _linearize(self, start: int, stop: int) -> Linearization:
        solved, scan, x = self.solved, self.solved.scan, self.x[start:stop]
        source = scan.z[start:stop]
        source = source if solved.write_mix == 1 else torch.lerp(x, source, solved.write_mix)
        keys = scan.keys[:, start:stop].unflatten(0, (solved.geometry.batch, -1)).permute(2, 0, 1, 3)
        rotary = None if solved.rotary is None else tuple(table[:, :, start:stop] for table in solved.rotary)
        return Linearization(self.block, x, scan.heads[start:stop], source, keys, rotary, solved.write_mix)  # type: ignore[arg-type]

    def _rows(self, start: int, stop: int) -> None:
        """Do a block of positions: pairs within it, each position's two products, and each one's own pair."""
        (batch, group, slot), scan = self.solved.geometry, self.solved.scan
        size, rows = stop - start, slice(start * group, stop * group)
        linear = self._linearize(start, stop)
        q, g, keys, values = self.q[:, rows], self.g[:, rows], scan.keys[:, start:stop], self.values[:, start:stop]
        weights = q @ keys.mT
        slots = range(slot + start, slot + stop)
        add_bias(weights, self.solved.bias.tile(slots, slots, weights), batch, group)
        weights = weights.sub_(self.lse[:, rows]).exp_()
        later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu().repeat_interleave(group, dim=0)
        weights = weights.masked_fill_(later, 0.0)
        by_key = weights.mT.contiguous()

        steps = (
            self.dz[start:stop].unbind(),
            self.dk[:, start:stop].split(1, 1),
            self.dv[:, start:stop].split(1, 1),
            values.split(1, 1),
            by_key.split(1, 1),
            g.unflatten(1, (size, group)).unbind(1),
            scan.heads[start:stop].neg().unbind(),
        )
        shape = (batch, -1, self.block.head_dim)
        for i, (dz, dk, dv, value, weight, g_i, minus_a) in reversed(list(enumerate(zip(*steps, strict=True)))):
            if i + 1 < size:
                after = slice((i + 1) * group, None)
                readers, weight = g[:, after], weight[..., after]
                d_logits = torch.bmm(value, readers.mT).mul_(weight)
                dk += torch.bmm(d_logits, q[:, after])
                dv += torch.bmm(weight, readers[..., :-1])
            linear.to_sources(i, dk.view(shape), dv.view(shape), dz)
            heads = linear.to_heads(i, dz)
            g_i[..., :-1] = heads.view(g_i.shape[0], group, -1)
            g_i[..., -1] = (heads * minus_a).view(g_i.shape[0], group, -1).sum(-1)

        d_logits = torch.bmm(g, values.mT).mul_(weights)
        self.dq[:, rows] += d_logits @ keys
        own_k, own_v = (t[:, start:stop, None] for t in (self.own_k, self.own_v))
        q, g, dq = (t.unflatten(1, (size, group)) for t in (q, g, self.dq[:, rows]))
        weight = ((q * own_k).sum(-1, keepdim=True) - self.lse[:, rows].unflatten(1, (size, group))).exp_()
        self.d_own_v[:, start:stop] = (weight * g[..., :-1]).sum(2)
        d_logit = weight * ((g[..., :-1] * own_v).sum(-1, keepdim=True) + g[..., -1:])
        self.d_own_k[:, start:stop] = (d_logit * q).sum(2)
        dq += d_logit * own_k

    def _tile(self, tile: Tile) -> None:
        scan, geometry = self.solved.scan, self.solved.geometry
        group = geometry.group
        for piece in pieces(tile, len(self.q) * group, self.solved.bias.oldest(tile.q0)):
            rows, at = slice(piece.q0 * group, piece.q1 * group), slice(piece.k0, piece.k1)
            q, g = self.q[:, rows], self.g[:, rows]
            weights = tile_logits(self.q, scan.keys, piece, self.solved.bias, geometry)
            weights = weights.sub_(self.lse[:, rows]).exp_()
            self.dv[:, at] += weights.mT @ g[..., :-1]
            d_logits = torch.bmm(g, self.values[:, at].mT).mul_(weights)
            self.dk[:, at] += d_logits.mT @ q
            self.dq[:, rows] += d_logits @ scan.keys[:, at]
