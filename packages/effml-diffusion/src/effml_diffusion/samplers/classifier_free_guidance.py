"""Classifier-free guidance: push the prediction away from what the model would say without the given tokens.

    logits = u + (w + 1) (c - u),   c = logits given everything, u = logits with the fixed tokens masked.

w = 0 is no guidance and costs nothing; otherwise every step takes two passes, as one batch of twice the rows or one
after the other. Combined only where logits are read. Source: arXiv 2207.12598 and, for masked diffusion, 2502.09992.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effml_diffusion.masked_diffusion import MaskedDiffusion

__all__ = ["conditional_and_unconditional", "guided_logits"]


def guided_logits(conditional: Tensor, unconditional: Tensor, weight: float) -> Tensor:
    """Return u + (weight + 1) (c - u) of two tensors of one shape; what is impossible given everything stays so.

    >>> guided_logits(torch.tensor([2.0]), torch.tensor([1.0]), 0.5).item()
    2.5
    """
    guided = torch.lerp(unconditional, conditional, weight + 1)
    return guided.masked_fill(conditional == -torch.inf, -torch.inf)  # where u is -inf too, the difference is NaN


def conditional_and_unconditional(
    diffusion: MaskedDiffusion,
    ids: Tensor,
    attention_mask: Tensor | None,
    t: Tensor | None,
    *,
    at: Tensor,
    condition: Tensor,
    batched: bool,
) -> tuple[Tensor, Tensor]:
    """Return logits (n, vocab) at flat positions `at` (n,): given all ids, and given none of `condition`.

    ids (batch, seq), condition (batch, seq) bool. batched: in one pass of twice the rows.
    """
    without = ids.masked_fill(condition, diffusion.mask_id)
    if not batched:
        conditional = diffusion.logits(ids, attention_mask, t, at=at)
        return conditional, diffusion.logits(without, attention_mask, t, at=at)
    mask, times = (None if x is None else torch.cat([x, x]) for x in (attention_mask, t))
    both = diffusion.logits(torch.cat([ids, without]), mask, times, at=torch.cat([at, at + ids.numel()]))
    conditional, unconditional = both.chunk(2)
    return conditional, unconditional
