"""Reductions and losses over tokens, accumulating in float32 or wider.

The chunked loss computes the logits slice by slice, and again in the backward pass: memory O(chunk x vocabulary)
instead of O(tokens x vocabulary), for a fourth product with the head beside the usual three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from effml_shared.errors import ConfigError

IGNORE_INDEX = -100  # a target that is not counted: PyTorch's convention


def widen(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged where it is float64: the type that statistics are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Average values over `dim` (None: all) where the boolean mask, of their shape, holds; 0 where it never does.

    >>> masked_mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False])).item()
    2.0
    """
    kept = torch.where(mask, widen(values), 0.0)
    return kept.sum(dim) / mask.sum(dim).clamp(min=1)


def gather_log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """Return log softmax(logits) at ids: logits (..., vocab), ids (...) -> (...)."""
    logits = widen(logits)
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def cross_entropy_sum(logits: Tensor, targets: Tensor, *, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy in nats summed over counted targets, and their number: sums of parts add up.

    logits (..., vocab); targets (...), -100 where not counted. z_loss is the weight of logsumexp(logits)^2 per token,
    which keeps logits from drifting (arXiv 2204.02311). With nothing counted, the sum and its gradients are 0.
    """
    logits, targets = widen(logits).flatten(0, -2), targets.flatten()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    counted = targets != IGNORE_INDEX
    if z_loss:
        total = total + z_loss * torch.where(counted, logits.logsumexp(-1).square(), 0.0).sum()
    return total, counted.sum()


def chunked_cross_entropy(
    hidden: Tensor,
    head: Tensor | Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    chunk: int = 2048,
    vocab_size: int | None = None,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return `cross_entropy_sum(head(hidden), targets)` with the logits of at most `chunk` tokens alive.

    hidden (..., dim), targets (...). head: a module or function to logits (..., rows), or its weight (rows, dim); rows
    from vocab_size on stay out of the softmax.
    """

    def piece(hidden: Tensor, head: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, head) if isinstance(head, Tensor) else head(hidden)
        return cross_entropy_sum(logits[:, :vocab_size], targets, z_loss=z_loss)

    if chunk < 1:
        raise ConfigError(f"chunk: got {chunk}, expected at least 1 token")
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if len(targets) <= chunk:  # a single chunk would be alive in the backward pass anyway: nothing to recompute for
        return piece(hidden, head, targets)
    sums = [
        checkpoint(piece, h, head, t, use_reentrant=False, preserve_rng_state=False)
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)
    ]
    return torch.stack([s for s, _ in sums]).sum(), torch.stack([n for _, n in sums]).sum()


def left_pad(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return the rows right-aligned as ids (batch, longest) int64, and the mask of real tokens, a bool of that shape.

    >>> left_pad([[1, 2, 3], [4]], pad_id=0)[0].tolist()
    [[1, 2, 3], [0, 0, 4]]
    """
    if not rows or not all(len(row) for row in rows):
        raise ConfigError(
            f"rows: got {[len(row) for row in rows]} tokens, expected at least one row, none of them empty"
        )
    ids = torch.full((len(rows), max(map(len, rows))), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, -len(row) :] = torch.as_tensor(row)
        mask[i, -len(row) :] = True
    return ids, mask
