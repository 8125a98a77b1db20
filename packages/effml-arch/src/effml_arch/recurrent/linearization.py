"""The vector-Jacobian products of a recurrent layer at a block of positions whose forward values are all known.

The backward pass of the recurrence goes through positions one by one, yet only the cotangents are new there: every
coefficient (norms, derivatives of the activation, angles) is computed here for a block of positions at once, and what
remains per position is linear, about twenty small operations. Two maps, both at fixed weights:

    source w -> persistent (k, v):  W_kv^T [key norm and rotation, transposed] then r1 (I - what what^T)
    heads a -> layer output z:      dz + r2 (I - uhat uhat^T) W_up^T act' W_down^T dz, then W_o^T

Memory: about 8 d_model + 2 d_ff numbers per position of the block.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from effml_arch.recurrent.folding import FoldedBlock

__all__ = ["Coefficients", "Linearization"]


class Coefficients(NamedTuple):
    """What the products need, at some positions or, without the first axis, at one."""

    mlp_scale: Tensor  # (n, batch, 1): r2
    mlp_unit: Tensor  # (n, batch, d_model): uhat / sqrt(d_model)
    slope: Tensor  # (n, batch, parts, d_ff): act', in two parts for a gated MLP
    source_scale: Tensor  # (n, batch, 1): r1 mu
    source_unit: Tensor  # (n, batch, d_model)
    straight: Tensor  # (n, batch, kv_heads, head_dim): cosines times scale and weight of the key norm
    key_unit: Tensor  # (n, batch, kv_heads, head_dim)
    turned: Tensor | None  # (n, batch, kv_heads, head_dim): sines likewise; None without rotation
    kept: Tensor | None  # (n, 2, batch, d_model), see `FoldedBlock.finish`; None without dropout


class Linearization:
    """Products at positions 0..n-1 of a block, from its inputs x, heads and sources, all (n, batch, d_model)."""

    def __init__(
        self,
        block: FoldedBlock,
        x: Tensor,
        heads: Tensor,
        source: Tensor,
        keys: Tensor,
        rotary: tuple[Tensor, Tensor] | None,
        write_mix: float,
        kept: Tensor | None = None,
    ) -> None:
        """Compute the coefficients.

        Args:
            keys: the persistent keys (n, batch, kv_heads, head_dim).
            rotary: as in `key_tables`, of these positions.
            kept: (n, 2, batch, d_model), see `FoldedBlock.finish`.
        """
        self.block, self.kv_dim, self.head_dim = block, block.kv_dim, block.head_dim
        self.to_source = block.key_value.split(self.kv_dim)
        self.keys = keys

        branch = torch.matmul(heads, block.out.t())
        u = branch.add_(x) if kept is None else torch.addcmul(x, branch, kept[:, 0])
        normed, mlp_scale, mlp_unit = block.mlp_norm.split(u)
        slope = self._activation_slope(F.linear(normed, block.up, block.up_bias))
        normed, r, source_unit = block.source_norm.split(source)
        straight, turned, key_unit = self._linearize_keys(normed, rotary)
        self.coefficients = Coefficients(
            mlp_scale, mlp_unit, slope, r * write_mix, source_unit, straight, key_unit, turned, kept
        )

    def _activation_slope(self, hidden: Tensor) -> Tensor:
        """Return d (act(gate) * up) / d (gate, up), or d act(up) / d up: (n, batch, parts, d_ff)."""
        gate, up = hidden.chunk(2, -1) if self.block.gated else (hidden, None)
        slope = self.block.derivative(torch.ones_like(gate), gate)
        return slope[..., None, :] if up is None else torch.stack([slope * up, self.block.activation(gate)], dim=-2)

    def _linearize_keys(
        self, normed: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        block, shape = self.block, self.keys.shape
        raw = F.linear(normed, block.key_value[: self.kv_dim])
        raw = raw if block.whole_keys else raw.view(shape)
        khat, r, _ = block.key_norm.split(raw)
        # <khat, w R^T dk> = <R (w khat), dk> = <k, dk>: the coefficient needs neither weight nor rotation again.
        unit = (khat * (r / raw.shape[-1])).view(shape)
        r = r[..., None] if block.whole_keys else r
        weight = 1.0 if block.key_weight is None else block.key_weight.view(-1, self.head_dim)
        if rotary is None:
            return (r * weight).expand(shape), None, unit
        cos, sin = (table.to(raw.dtype).permute(2, 0, 1, 3) for table in rotary)
        straight = (r * weight) * torch.cat([cos, cos], -1)
        return straight.expand(shape), ((r * weight) * torch.cat([sin, -sin], -1)).expand(shape), unit

    @cached_property
    def _positions(self) -> list[Coefficients]:
        """What `coefficients` has, for one position after the other."""
        columns = [[None] * len(self.keys) if t is None else t.unbind() for t in self.coefficients]
        return [Coefficients(*position) for position in zip(*columns, strict=True)]

    def to_sources(self, i: int, dk: Tensor, dv: Tensor, dz: Tensor) -> None:
        """Add to dz (batch, d_model) what the cotangents dk, dv (batch, kv_heads, head_dim) of position i amount to."""
        c = self._positions[i]
        raw = dk * c.straight
        if c.turned is not None:
            raw.addcmul_(dk.roll(self.head_dim // 2, -1), c.turned)
        if self.block.key_weight is not None:
            along = (dk * self.keys[i]).sum((-2, -1) if self.block.whole_keys else -1, keepdim=True)
            raw.addcmul_(c.key_unit, along, value=-1)
        w_k, w_v = self.to_source
        d = torch.mm(raw.flatten(1), w_k).addmm_(dv.flatten(1), w_v)
        d.addcmul_(c.source_unit, (d * c.source_unit).sum(-1, keepdim=True), value=-1)
        dz.addcmul_(d, c.source_scale)

    def to_heads(self, i: int, dz: Tensor) -> Tensor:
        """Return the cotangent of position i's heads from that of its output, both (batch, d_model)."""
        c, block = self._positions[i], self.block
        branch = dz if c.kept is None else dz * c.kept[1]
        hidden = torch.mm(branch, block.down)[:, None] * c.slope
        d = torch.mm(hidden.flatten(1), block.up)
        d.addcmul_(c.mlp_unit, (d * c.mlp_unit).sum(-1, keepdim=True), value=-1)
        d = torch.addcmul(dz, d, c.mlp_scale)
        return torch.mm(d if c.kept is None else d.mul_(c.kept[0]), block.out)
