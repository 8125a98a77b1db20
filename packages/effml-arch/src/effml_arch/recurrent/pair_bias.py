"""What is added to the logit of a query and an earlier key: ALiBi, and minus infinity where the key is hidden.

Computed tile by tile from indices, so that no bias of all pairs ever exists: O(tile) instead of heads x N^2 numbers.
A query's own pair is not asked for here: it is never hidden and its bias is 0, whence no row of attention is empty.
Source: ALiBi, arXiv 2108.12409, with slopes 2^(-8h / heads) for any number of heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from effml_shared.layers import alibi_bias
from torch import Tensor

__all__ = ["PairBias", "add_bias"]


@dataclass(frozen=True)
class PairBias:
    """Which earlier keys a query sees and with what bias; positions are slots, those of a cache included."""

    alibi_heads: int | None = None  # the number of query heads, with ALiBi
    key_valid: Tensor | None = None  # (batch, slots) bool, False hides a key
    doc_ids: Tensor | None = None  # (batch, slots), a query sees keys of its own document
    window: int | None = None  # a query sees keys less than this many slots back

    def oldest(self, query: int) -> int:
        """Return the oldest slot that a query at a slot may see."""
        return 0 if self.window is None else max(0, query - self.window + 1)

    def tile(self, queries: range, keys: range, like: Tensor) -> Tensor | None:
        """Return the bias (batch or 1, heads or 1, queries, keys) of these slots; None: 0 for every pair.

        Its type and device are those of `like`.
        """
        oldest = self.oldest(queries.stop - 1)
        windowed = keys.start < oldest  # then the oldest is `window` slots before the end
        hidden: list[Tensor] = []
        bias: Tensor | None = None
        if windowed or self.alibi_heads is not None:
            slots = [torch.arange(r.start, r.stop, device=like.device) for r in (queries, keys)]
            distance = slots[0][:, None] - slots[1]
            if windowed:
                hidden.append((distance >= queries.stop - oldest)[None, None])
            if self.alibi_heads is not None:
                bias = alibi_bias(self.alibi_heads, distance[None].to(like.dtype))
        if self.key_valid is not None:
            hidden.append(~self.key_valid[:, None, None, keys.start : keys.stop])
        if self.doc_ids is not None:
            own = self.doc_ids[:, queries.start : queries.stop, None]
            hidden.append((own != self.doc_ids[:, None, keys.start : keys.stop])[:, None])
        for mask in hidden:
            shape = (1, 1, len(queries), len(keys)) if bias is None else bias.shape
            zeros = like.new_zeros(1) if bias is None else bias
            bias = zeros.expand(torch.broadcast_shapes(mask.shape, shape)).masked_fill(mask, -math.inf)
        return bias


def add_bias(logits: Tensor, bias: Tensor | None, batch: int, group: int) -> Tensor:
    """Add a tile's bias in place to logits (batch x kv_heads, queries x group, keys), and return them."""
    if bias is not None:
        heads = bias.shape[1]
        split = bias.unflatten(1, (heads // group, group) if heads > 1 else (1, 1))
        logits.view(batch, -1, bias.shape[2], group, bias.shape[3]).add_(split.transpose(2, 3))
    return logits
