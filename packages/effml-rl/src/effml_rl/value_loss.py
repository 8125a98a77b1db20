"""The clipped squared error of a value head: 1/2 max((v - R)^2, (v_old + clip(v - v_old, -c, c) - R)^2).

The maximum removes the reason to move a value by more than c from what it was when the advantages were computed.
Cost: O(batch x T). Source: the PPO implementation of arXiv 1707.06347, described in arXiv 2005.12729.
"""

from __future__ import annotations

import torch
from effml_shared.errors import ConfigError
from effml_shared.tensors import widen
from torch import Tensor

from effml_rl.aggregation import aggregate
from effml_rl.token_shapes import check_tokens

__all__ = ["value_loss"]


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float | None = 0.2,
    reduction: str = "token_mean",
    max_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss as a sum and a count, see `aggregate`.

    Args:
        values: (batch, T), each at the hidden state that emits the token; the gradient flows into it.
        old_values: (batch, T), those that `gae` was given. returns: (batch, T), from `gae`, not whitened.
        mask: (batch, T) bool; slots outside it have no influence, whatever they hold.
        clip: in units of value. None: the plain squared error.
    """
    if clip is not None and not clip > 0:
        raise ConfigError(f"clip: got {clip}, expected a number > 0 or None")
    check_tokens(mask, values=values, old_values=old_values, returns=returns)
    values = torch.where(mask, widen(values), 0.0)
    old_values, returns = (torch.where(mask, widen(x.detach()), 0.0) for x in (old_values, returns))
    errors = (values - returns).square()
    if clip is not None:
        errors = torch.maximum(errors, (old_values + (values - old_values).clamp(-clip, clip) - returns).square())
    return aggregate(errors / 2, mask, reduction, max_len=max_len)
