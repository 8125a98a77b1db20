"""What one position of several recurrent layers computes at once: the matrices of `FoldedBlock`, stacked.

Layers of one shape become one more axis of every matrix, and each product of rows with a matrix a batch of products.
Rows are (layer, sequence), layers first, so that attention, which has no weights, sees nothing but a larger batch.
State: a copy of the layers' weights. Cost: that of the layers, in as many operations as one of them takes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from effml_shared.layers import Block
from torch import Tensor

from effml_arch.recurrent.folding import FoldedBlock, Norm, turning_tables
from effml_arch.recurrent.tiled import Queries

__all__ = ["StackedBlocks"]


class StackedBlocks(FoldedBlock):
    """The folded matrices of several layers that differ in nothing but their weights, queries' among them."""

    def __init__(self, layers: Sequence[Block], dtype: torch.dtype) -> None:
        blocks, attns = [FoldedBlock.of(layer, dtype) for layer in layers], [layer.self_attn for layer in layers]
        self.__dict__.update(vars(blocks[0]))
        self.query_norm = Norm(type(attns[0].q_norm), getattr(attns[0].q_norm, "eps", 0.0))
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):  # block by block, so that no more than one kind of matrix exists twice
                setattr(self, name, torch.stack([vars(block).pop(name) for block in blocks]))
        self.query = torch.stack(
            [
                self.source_norm.fold(attn.q_proj.weight.to(dtype), getattr(layer.input_layernorm, "weight", None))
                for attn, layer in zip(attns, layers, strict=True)
            ]
        )
        weights: list[Any] = [getattr(attn.q_norm, "weight", None) for attn in attns]
        self.query_weight = None if weights[0] is None else torch.stack([w.to(dtype) for w in weights])

    def part(self, layers: slice) -> StackedBlocks:
        """Return some of the layers; no memory is copied."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(part, name, value[layers])
        return part

    def queries(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Queries:
        """Return the queries and own pairs of x (positions, layers, batch, d_model)."""
        n, layers, batch, _ = x.shape
        normed, shape = self.source_norm(x).transpose(0, 1).flatten(1, 2), (layers, n, batch)
        rows = x.flatten(1, 2)
        raw = torch.bmm(normed, self.query.mT).view(*shape, -1).transpose(0, 1).flatten(1, 2)
        q = self._turned(raw, self.query_norm, self._tables(self.query_weight, rotary, rows))
        raw = torch.bmm(normed, self.key_value.mT).view(*shape, -1).transpose(0, 1).flatten(1, 2)
        keys, values = raw.split(self.kv_dim, -1)
        keys = self._turned(keys, self.key_norm, self.key_tables(rotary, rows))
        values = values.unflatten(-1, (-1, self.head_dim))
        own = (t.permute(1, 2, 0, 3).flatten(0, 1).contiguous() for t in (keys, values))
        q = q.unflatten(2, (keys.shape[2], -1)).permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1)
        return Queries(q * self.head_dim**-0.5, *own)

    def key_tables(self, rotary: tuple[Tensor, Tensor] | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return self._tables(self.key_weight, rotary, like)

    def _tables(
        self, weight: Tensor | None, rotary: tuple[Tensor, Tensor] | None, like: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        if weight is not None:
            rows = like.shape[1] // len(weight)  # of each layer
            weight = weight.unflatten(1, (-1, self.head_dim)).repeat_interleave(rows, dim=0)[None]
        return turning_tables(weight, rotary, like.dtype)

    def _turned(self, raw: Tensor, norm: Norm, table: tuple[Tensor | None, Tensor | None]) -> Tensor:
        """Return raw (.., rows, heads x head_dim) after its norm and rotation: (.., rows, heads, head_dim)."""
        heads = norm(raw) if self.whole_keys else norm(raw.unflatten(-1, (-1, self.head_dim)))
        heads = heads.unflatten(-1, (-1, self.head_dim)) if self.whole_keys else heads
        cos, sin = table
        straight = heads if cos is None else heads * cos
        return straight if sin is None else straight.addcmul(heads.roll(self.head_dim // 2, -1), sin)

    def finish(self, x: Tensor, heads: Tensor, kept: Tensor | None = None) -> Tensor:
        """Do as one layer does, without dropout."""
        x, heads = (t.unflatten(0, (len(self.out), -1)) for t in (x, heads))
        u = torch.baddbmm(x, heads, self.out.mT)
        hidden = torch.bmm(self.mlp_norm(u), self.up.mT)
        hidden = hidden if self.up_bias is None else hidden.add_(self.up_bias[:, None])
        if self.gated:
            gate, up = hidden.chunk(2, -1)
            hidden = self.activation(gate).mul_(up)
        else:
            hidden = self.activation(hidden)
        z = u.baddbmm_(hidden, self.down.mT)
        return (z if self.down_bias is None else z.add_(self.down_bias[:, None])).flatten(0, 1)

    def persist(self, source: Tensor, table: tuple[Tensor | None, Tensor | None], k: Tensor, v: Tensor) -> None:
        normed = self.source_norm(source).unflatten(0, (len(self.out), -1))
        keys, values = torch.bmm(normed, self.key_value.mT).flatten(0, 1).split(self.kv_dim, -1)
        v.copy_(values.reshape(v.shape))
        k.copy_(self._turned(keys, self.key_norm, table).reshape(k.shape))
