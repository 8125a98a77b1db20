"""Advantages of tokens from token rewards: generalised advantage estimation, returns to go, whitening.

With V the value read at the hidden state that emits a token, and V = A = 0 beyond the last counted token,

    delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lambda A_{t+1}        return_t = A_t + V_t

where t + 1 means the next *counted* token: slots outside the mask, such as what a tool wrote in the middle of a
completion, are passed over. The recurrence is linear, so it is solved by doubling: after j rounds each slot holds the
sum over the next 2^j, which takes log2 T rounds over the batch in place of T dependent steps (10 against 1,000 launches
on a GPU). Cost: O(batch T log T).

Source: arXiv 1506.02438; the masked form and its solution by doubling are our own. REINFORCE++: arXiv 2501.03262.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from effml_shared.checks import check_range
from effml_shared.errors import ConfigError
from effml_shared.tensors import masked_mean, widen
from torch import Tensor

from effml_rl.token_shapes import check_tokens

__all__ = ["gae", "reinforce_pp", "whiten"]


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, both (batch, T), 0 outside the mask and without gradient.

    Args:
        rewards: (batch, T) of tokens, see `token_rewards`. values: (batch, T). mask: (batch, T) bool.
        gamma: discount per token. lam: 1 gives return minus value, 0 the one-step error.

    >>> mask = torch.ones(1, 4, dtype=torch.bool)
    >>> adv, _ = gae(torch.tensor([[0.0, 0, 0, 1]]), torch.tensor([[0.5, 0.6, 0.7, 0.8]]), mask, lam=1.0)
    >>> [round(a, 6) for a in adv[0].tolist()]
    [0.5, 0.4, 0.3, 0.2]
    """
    check_tokens(mask, rewards=rewards, values=values)
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ConfigError(f"{name}: got {factor}, expected a number in [0, 1]")
    rewards, values = (torch.where(mask, widen(x.detach()), 0.0) for x in (rewards, values))
    errors = torch.where(mask, rewards + gamma * _next_counted(values, mask) - values, 0.0)
    decay = torch.ones_like(errors).masked_fill(mask, gamma * lam)
    # Round j: A_t <- A_t + C_t A_{t+2^j}, where C_t is the product of decays over [t, t + 2^j).
    shift = 1
    while shift < mask.shape[1]:
        errors = errors + decay * F.pad(errors[:, shift:], (0, shift))
        decay = decay * F.pad(decay[:, shift:], (0, shift))
        shift *= 2
    advantages = torch.where(mask, errors, 0.0)
    return advantages, advantages + values


def reinforce_pp(rewards: Tensor, mask: Tensor) -> Tensor:
    """Return the whitened sums of the rewards (batch, T) from each token on, for any number of samples per prompt."""
    return whiten(gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)[0], mask)


def whiten(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Return values (batch, T) at mean 0 and variance 1 over all counted slots, 0 elsewhere.

    The variance has n - 1 in its denominator. Whiten advantages, after the returns were computed, never returns.

    Raises:
        ConfigError: shapes differ, or fewer than two slots are counted.
    """
    check_tokens(mask, values=values)
    check_range("eps", eps, 0.0)
    count = int(mask.sum())
    if count < 2:
        raise ConfigError(f"mask: got {count} counted tokens, expected at least 2 to have a variance")
    centred = torch.where(mask, widen(values) - masked_mean(values, mask), 0.0)
    return centred * (centred.square().sum() / (count - 1) + eps).rsqrt()


def _next_counted(values: Tensor, mask: Tensor) -> Tensor:
    """Return for each slot the value (batch, T) of the next counted one, 0 if there is none."""
    length = mask.shape[1]
    slots = torch.arange(length, device=mask.device)
    here_or_later = torch.where(mask, slots, length).flip(1).cummin(1).values.flip(1)
    following = F.pad(here_or_later[:, 1:], (0, 1), value=length)
    return F.pad(values, (0, 1)).gather(1, following)
