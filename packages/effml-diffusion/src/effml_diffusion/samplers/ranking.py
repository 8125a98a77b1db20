"""Choose the best positions of every row at once: the only place where positions compete.

Two stable sorts, O(batch x seq x log seq), no loop over rows and nothing read back by the host. Equal scores go to the
lowest position. A tier comes before every score, so that "fixed, then committed, then masked" needs no sentinel scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["best_per_row", "flat_index", "ranks"]


def ranks(score: Tensor, tier: Tensor | None = None) -> Tensor:
    """Return the place of every position in its row, 0 for the best: (batch, seq) int64.

    Higher tiers (batch, seq) come first, then higher scores (batch, seq), then lower positions.

    >>> ranks(torch.tensor([[1.0, 3.0, 3.0]])).tolist()
    [[2, 0, 1]]
    """
    order = score.argsort(dim=1, descending=True, stable=True)
    if tier is not None:
        by_tier = tier.gather(1, order).argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, by_tier)
    places = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)


def best_per_row(score: Tensor, eligible: Tensor, count: Tensor | int) -> Tensor:
    """Return which eligible positions are the `count` best of their row by score, all of them if they are fewer.

    score (batch, seq), eligible (batch, seq) bool, count (batch,) or one for all -> (batch, seq) bool.

    >>> best_per_row(torch.tensor([[9.0, 1.0, 2.0]]), torch.tensor([[False, True, True]]), 1).tolist()
    [[False, False, True]]
    """
    limit = count[:, None] if isinstance(count, Tensor) else count
    return (ranks(score, tier=eligible.byte()) < limit) & eligible


def flat_index(mask: Tensor, size: int | None = None) -> Tensor:
    """Return the flat indices where a boolean mask holds, (n,) int64, in order.

    `size`, where the caller knows n, spares the host from waiting for the device.
    """
    flat = mask.flatten()
    return (flat.nonzero() if size is None else flat.nonzero_static(size=size)).squeeze(1)
