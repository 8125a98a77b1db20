"""The vector-Jacobian products of a recurrent layer at a block of positions whose forward values are all known.

The backward pass of the recurrence goes through positions one by one, yet only the cotangents are new there: every
coefficient (norms, derivatives of the activation, angles) is computed here for a block of positions at once, and what
remains per position is linear, about twenty small operations. Two maps, both at fixed weights:

    source w -> persistent (k, v):  W_kv^T [key norm and rotation, transposed] then r1 (I - what what^T)
    heads a -> layer output z:      dz + r2 (I - uhat uhat^T) W_up^T act' W_down^T dz, then W_o^T

Memory: about 8 d_model + 2 d_ff numbers per position of the block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effml_arch.recurrent.folding import FoldedBlock

__all__ = ["Linearization"]


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
    ) -> None:
        """keys: the persistent keys (n, batch, kv_heads, head_dim); rotary: as in `key_tables`, of these positions."""
        self.block, self.kv_dim, self.head_dim = block, block.kv_dim, block.head_dim
        self.out, self.up, self.down = block.out, block.up, block.down
        self.to_source = block.key_value.split(self.kv_dim)

        u = torch.matmul(heads, block.out.t()).add_(x)
        normed, r, unit = block.mlp_norm.split(u)
        self.mlp_scale, self.mlp_unit = r.unbind(), unit.unbind()
        self.slope = self._activation_slope(F.linear(normed, block.up, block.up_bias)).unbind()

        normed, r, unit = block.source_norm.split(source)
        self.source_scale, self.source_unit = (r * write_mix).unbind(), unit.unbind()
        self._linearize_keys(normed, keys, rotary)

    def _activation_slope(self, hidden: Tensor) -> Tensor:
        """Return d (act(gate) * up) / d (gate, up), or d act(up) / d up: (n, batch, parts, d_ff)."""
        gate, up = hidden.chunk(2, -1) if self.block.gated else (hidden, None)
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            value = self.block.activation(leaf)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return slope[..., None, :] if up is None else torch.stack([slope * up, value.detach()], dim=-2)

    def _linearize_keys(self, normed: Tensor, keys: Tensor, rotary: tuple[Tensor, Tensor] | None) -> None:
        block, shape = self.block, keys.shape
        raw = F.linear(normed, block.key_value[: self.kv_dim])
        raw = raw if block.whole_keys else raw.view(shape)
        khat, r, _ = block.key_norm.split(raw)
        # <khat, w R^T dk> = <R (w khat), dk> = <k, dk>: the coefficient needs neither weight nor rotation again.
        self.normalised = block.key_weight is not None
        unit = (khat * (r / raw.shape[-1])).view(shape)
        r = r[..., None] if block.whole_keys else r
        weight = 1.0 if block.key_weight is None else block.key_weight.view(-1, self.head_dim)
        cos, sin = None, None
        if rotary is not None:
            cos, sin = (table.to(keys.dtype).permute(2, 0, 1, 3) for table in rotary)
            cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, -sin], -1)
        self.straight = ((r * weight) * (1.0 if cos is None else cos)).expand(shape).unbind()
        self.turned = None if sin is None else ((r * weight) * sin).expand(shape).unbind()
        self.keys, self.key_unit = keys.unbind(), unit.unbind()

    def to_sources(self, i: int, dk: Tensor, dv: Tensor, dz: Tensor) -> None:
        """Add to dz (batch, d_model) what the cotangents dk, dv (batch, kv_heads, head_dim) of position i amount to."""
        raw = dk * self.straight[i]
        if self.turned is not None:
            raw.addcmul_(dk.roll(self.head_dim // 2, -1), self.turned[i])
        if self.normalised:
            along = (dk * self.keys[i]).sum((-2, -1) if self.block.whole_keys else -1, keepdim=True)
            raw.addcmul_(self.key_unit[i], along, value=-1)
        w_k, w_v = self.to_source
        d = torch.mm(raw.flatten(1), w_k).addmm_(dv.flatten(1), w_v)
        unit = self.source_unit[i]
        d.addcmul_(unit, (d * unit).sum(-1, keepdim=True), value=-1)
        dz.addcmul_(d, self.source_scale[i])

    def to_heads(self, i: int, dz: Tensor) -> Tensor:
        """Return the cotangent of position i's heads from that of its output, both (batch, d_model)."""
        hidden = torch.mm(dz, self.down)[:, None] * self.slope[i]
        d = torch.mm(hidden.flatten(1), self.up)
        unit = self.mlp_unit[i]
        d.addcmul_(unit, (d * unit).sum(-1, keepdim=True), value=-1)
        return torch.mm(torch.addcmul(dz, d, self.mlp_scale[i]), self.out)
