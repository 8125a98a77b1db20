"""From what a verifier says to rewards: unscored rollouts, answers that are too long, a KL penalty per token.

Cost: O(batch x T). Sources: the overlong penalty is DAPO's, arXiv 2503.14476 section 3.4; the KL penalty inside the
reward is that of arXiv 2203.02155. A KL penalty belongs into the reward or into the loss, never into both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError
from effml_shared.tensors import widen
from torch import Tensor

from effml_rl.token_shapes import check_tokens

__all__ = ["overlong_penalty", "stack_rewards", "token_rewards"]


def stack_rewards(*verifiers: Sequence[float | None]) -> Tensor:
    """Return what one verifier said of each rollout, (batch,), or what R of them did, (batch, R); float32.

    None (not scored) becomes NaN, which is how `advantages` knows it.

    Raises:
        ConfigError: a verifier returned NaN or an infinite number, or they differ in how many they returned.

    >>> stack_rewards([1.0, None, 0.0]).tolist()
    [1.0, nan, 0.0]
    >>> stack_rewards([1.0, 0.0, 1.0], [0.5, None, 0.5]).shape
    torch.Size([3, 2])
    """
    if len({len(rewards) for rewards in verifiers}) != 1:
        raise ConfigError(f"rewards: got {[len(r) for r in verifiers]} values, expected as many from every verifier")
    for rewards in verifiers:
        for index, value in enumerate(rewards):
            if value is not None and not math.isfinite(value):
                raise ConfigError(f"rewards[{index}]: got {value}, expected a finite number, or None where not scored")
    columns = [[math.nan if value is None else float(value) for value in rewards] for rewards in verifiers]
    stacked = torch.tensor(columns, dtype=torch.float32)
    return stacked[0] if len(verifiers) == 1 else stacked.T.contiguous()


def overlong_penalty(lengths: Tensor, max_len: int, margin: int) -> Tensor:
    """Return the penalty (batch,) for completions of lengths (batch,) tokens, to be added to the rewards.

    0 up to max_len - margin tokens, from there linearly down to -1 at max_len, -1 beyond. DAPO: 20480 and 4096.

    >>> overlong_penalty(torch.tensor([16384, 18432, 20480, 20481]), max_len=20480, margin=4096).tolist()
    [0.0, -0.5, -1.0, -1.0]
    """
    check_count("margin", margin, 1)
    check_count("max_len", max_len, margin)
    return ((max_len - margin - lengths).float() / margin).clamp(-1.0, 0.0)


def token_rewards(
    rewards: Tensor,
    mask: Tensor,
    kl: Tensor | None = None,
    *,
    beta: float = 0.0,
    limit: float | None = 10.0,
) -> Tensor:
    """Return rewards per token, (batch, T): -beta KL everywhere, the completion's own at its last counted token.

    Args:
        rewards: (batch,); NaN where not scored, which gives 0: keep such rows out of the loss by its mask.
        mask: (batch, T) bool; slots outside it get 0, whatever they hold.
        kl: (batch, T), `kl(logps, ref_logps, "k1")` of the policy that sampled; no gradient flows into it.
        beta: weight of the KL.
        limit: rewards are clamped to [-limit, limit]. None: not at all.
    """
    check_range("beta", beta, 0.0)
    check_tokens(mask, kl=kl)
    if rewards.shape != mask.shape[:1]:
        raise ConfigError(f"rewards: got shape {tuple(rewards.shape)}, expected ({len(mask)},)")
    if (kl is None) != (beta == 0.0):
        raise ConfigError(f"kl, beta: got {'no kl' if kl is None else 'kl'} with beta {beta}, expected both or neither")
    rewards = widen(rewards.detach()).nan_to_num(nan=0.0)
    rewards = rewards if limit is None else rewards.clamp(-limit, limit)
    index = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, index, -1).amax(1, keepdim=True)
    terminal = torch.where(index == last, rewards.unsqueeze(1), 0.0)
    return terminal if kl is None else terminal - beta * torch.where(mask, widen(kl.detach()), 0.0)
