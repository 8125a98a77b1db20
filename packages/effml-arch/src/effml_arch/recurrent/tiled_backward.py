"""The backward pass of the recurrence: exact, positions in reverse order, tiles in reverse order of the forward pass.

The layer's output and persistent pairs satisfy Z = finish(X, A) and (K, V) = pairs(Z), where A is attention over K, V.
With A and Z known, both are evaluated once more for all positions in parallel, where A and Z count as constants and
ordinary autograd sees weights and inputs. What autograd cannot see is that a position's output feeds later positions,
so `Cotangents` finds the total cotangents of Z, K, V and of the queries and own pairs, position by position:

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
from typing import cast

import torch
from torch import Tensor

from effml_arch.recurrent import kernels
from effml_arch.recurrent.attention_state import Geometry, pieces, tile_logits
from effml_arch.recurrent.folding import FoldedBlock
from effml_arch.recurrent.linearization import Linearization
from effml_arch.recurrent.native import NativeBackward, serves
from effml_arch.recurrent.pair_bias import PairBias, add_bias
from effml_arch.recurrent.schedule import Tile
from effml_arch.recurrent.tiled import Queries, Scan

__all__ = ["Cotangents", "Solved"]

SPAN = 1 << 20  # coefficients of positions that are computed at once, but those of a block: 4 MiB in float32


@dataclass
class Solved:
    """A finished forward pass and its settings, as those of `effml_arch.recurrent.tiled.scan`."""

    scan: Scan
    bias: PairBias
    geometry: Geometry
    rotary: tuple[Tensor, Tensor] | None
    write_mix: float
    base_block: int
    tiles: dict[int, Tile]
    kept: Tensor | None = None


class Cotangents:
    """The total cotangents of a layer's output, queries and pairs, filled in from the last block to the first.

    dz (seq, batch, d_model), dq, dk, dv, d_own_k and d_own_v, the last five as their tensors in `Queries` and `Scan`.
    """

    def __init__(self, solved: Solved, block: FoldedBlock, x: Tensor, queries: Queries, dz: Tensor) -> None:
        """x, dz: (seq, batch, d_model), the latter what later layers ask for."""
        self.solved, self.block, self.x = solved, block, x
        self.q, self.own_k, self.own_v = q, own_k, _ = queries
        self.dz = dz.clone(memory_format=torch.contiguous_format)
        self.dq = torch.zeros_like(q)
        self.dk, self.dv = torch.zeros_like(own_k), torch.zeros_like(own_k)
        # Rows (g_t, -D_t): their product with (v_i, 1) is <g_t, v_i> - D_t.
        self.g = q.new_zeros(*q.shape[:2], q.shape[2] + 1)
        self.lse = cast(Tensor, solved.scan.lse)
        values = solved.scan.values
        self.values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
        self.linear, self.first = self._linearize(len(x))
        self.native: NativeBackward | None = None
        read = {"keys": solved.scan.keys, "values": values, "heads": solved.scan.heads, "lse": self.lse}
        if serves(block, x, q, own_k, *read.values()):
            written = {"g": self.g, "dz": self.dz, "dk": self.dk, "dv": self.dv, "dq": self.dq}
            self.native = NativeBackward(block, x, q, solved.bias, solved.geometry, read, written)
            self.native.linearize(self.first, self.linear)

    def solve(self) -> None:
        """Fill them in; once only."""
        n, base = len(self.x), self.solved.base_block
        for start in range((n - 1) // base * base, -1, -base):
            stop = min(start + base, n)
            if start < self.first:
                self.linear, self.first = self._linearize(stop)
                if self.native is not None:
                    self.native.linearize(self.first, self.linear)
            (self._rows if self.native is None else self.native.run)(start, stop)
            if start in self.solved.tiles:
                (self._tile if self.native is None else self.native.spread)(self.solved.tiles[start])
        self._own_pairs()

    def _linearize(self, stop: int) -> tuple[Linearization, int]:
        """Return the products of as many blocks before `stop` as `SPAN` allows, at least one, and where they begin."""
        solved, scan, base = self.solved, self.solved.scan, self.solved.base_block
        of_one = 8 * self.x[0].numel() + 2 * self.x.shape[1] * len(self.block.up)
        start = max(0, (stop - 1) // base - SPAN // (of_one * base)) * base
        x = self.x[start:stop]
        source = scan.z[start:stop]
        source = source if solved.write_mix == 1 else torch.lerp(x, source, solved.write_mix)
        keys = scan.keys[:, start:stop].unflatten(0, (solved.geometry.batch, -1)).permute(2, 0, 1, 3)
        rotary = None if solved.rotary is None else tuple(table[:, :, start:stop] for table in solved.rotary)
        kept = None if solved.kept is None else solved.kept[start:stop].to(x.dtype)
        heads, mix = scan.heads[start:stop], solved.write_mix
        return Linearization(self.block, x, heads, source, keys, rotary, mix, kept), start  # type: ignore[arg-type]

    def _rows(self, start: int, stop: int) -> None:
        """Do a block of positions: pairs within it, and each position's two products."""
        (batch, group, slot), scan = self.solved.geometry, self.solved.scan
        size, rows = stop - start, slice(start * group, stop * group)
        linear, before = self.linear, start - self.first
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
            linear.to_sources(before + i, dk.view(shape), dv.view(shape), dz)
            heads = linear.to_heads(before + i, dz)
            g_i[..., :-1] = heads.view(g_i.shape[0], group, -1)
            g_i[..., -1] = (heads * minus_a).view(g_i.shape[0], group, -1).sum(-1)

        d_logits = torch.bmm(g, values.mT).mul_(weights)
        self.dq[:, rows] += d_logits @ keys

    def _own_pairs(self) -> None:
        """Do what queries read of their own positions, all at once, since nothing else depends on it."""
        group = self.solved.geometry.group
        q, g, dq, lse = (t.unflatten(1, (-1, group)) for t in (self.q, self.g, self.dq, self.lse))
        own_k, own_v = self.own_k[:, :, None], self.own_v[:, :, None]
        weight = ((q * own_k).sum(-1, keepdim=True) - lse).exp_()
        self.d_own_v = (weight * g[..., :-1]).sum(2)
        d_logit = ((g[..., :-1] * own_v).sum(-1, keepdim=True) + g[..., -1:]).mul_(weight)
        self.d_own_k = (d_logit * q).sum(2)
        dq.addcmul_(d_logit, own_k)

    def _tile(self, tile: Tile) -> None:
        scan, geometry = self.solved.scan, self.solved.geometry
        group = geometry.group
        if kernels.serves(self.q):
            read, added = (self.q, scan.keys, scan.values, self.g, self.lse), (self.dq, self.dk, self.dv)
            kernels.tile_cotangents(*read, *added, tile, self.solved.bias, geometry)
            return
        for piece in pieces(tile, len(self.q) * group, self.solved.bias.oldest(tile.q0)):
            rows, at = slice(piece.q0 * group, piece.q1 * group), slice(piece.k0, piece.k1)
            q, g = self.q[:, rows], self.g[:, rows]
            weights = tile_logits(self.q, scan.keys, piece, self.solved.bias, geometry)
            weights = weights.sub_(self.lse[:, rows]).exp_()
            self.dv[:, at] += weights.mT @ g[..., :-1]
            d_logits = torch.bmm(g, self.values[:, at].mT).mul_(weights)
            self.dk[:, at] += d_logits.mT @ q
            self.dq[:, rows] += d_logits @ scan.keys[:, at]
