"""Advantages of whole completions from their rewards, for n samples of each prompt.

With mu and s the mean and the standard deviation (n - 1 in the denominator) of a prompt's rewards r:

    reinforce   r                    no baseline; n = 1 is allowed (arXiv 2402.14740, section 3)
    group_mean  r - mu               Dr. GRPO, arXiv 2503.20783: (n-1)/n of RLOO, in the same direction
    rloo        n/(n-1) (r - mu)     each sample against the mean of the others, arXiv 2402.14740: unbiased
    grpo        (r - mu)/(s + eps)   arXiv 2402.03300
    batch_std   (r - mu)/(s_batch + eps), with the deviation of all rewards of the batch about their own mean

A rollout that could not be scored has the reward NaN. It takes no part in the statistics, and its advantage is 0; so
are those of a prompt with fewer than two scored rollouts. Where all rewards of a prompt are equal the advantages are
set to exactly 0: in float32 the mean of eight times 0.3 is not 0.3, and dividing the rounding error by s + 1e-9 gives
advantages near 1.

Several rewards per rollout are added and then normalised, or each is normalised within its group, they are added, and
the sum is divided by its deviation over the batch (arXiv 2601.05242), so that a rare reward is not drowned by one of
large spread. Sums over groups of normalised rewards have mean 0, which is why no mean is subtracted the second time.

Cost: O(batch). Statistics are in float32 or wider, over the whole batch: call it once per step, before micro-batching.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError
from effml_shared.tensors import widen
from torch import Tensor

__all__ = ["advantages", "tied_groups"]

KINDS = ("reinforce", "group_mean", "rloo", "grpo", "batch_std")


def advantages(
    rewards: Tensor,
    n: int,
    kind: str = "grpo",
    *,
    eps: float = 1e-4,
    weights: Sequence[float] | None = None,
    multi: str = "sum_then_normalize",
) -> Tensor:
    """Return the advantage of each rollout, (batch, 1).

    Args:
        rewards: (batch,), or (batch, R) for R kinds of reward; NaN where not scored. The n samples of a prompt are
            neighbours.
        n: samples per prompt.
        kind: see the module.
        eps: added to a standard deviation.
        weights: R factors of the rewards (default: all 1). A missing reward of a rollout with others counts 0.
        multi: `"sum_then_normalize"`, or `"normalize_then_sum"`, which is defined for `"grpo"`.

    Raises:
        ConfigError: the batch is not a multiple of n, n < 2 with a kind that compares samples, a reward is infinite, or
            an option does not fit the shape of the rewards.

    >>> advantages(torch.tensor([1.0, 2.0, 3.0, 6.0]), n=4, kind="rloo").flatten().tolist()
    [-2.6666667461395264, -1.3333333730697632, 0.0, 4.0]
    """
    check_choice("kind", kind, KINDS)
    check_choice("multi", multi, ("sum_then_normalize", "normalize_then_sum"))
    check_range("eps", eps, 0.0)
    if kind != "reinforce" and n < 2:
        raise ConfigError(f"n: got {n}, expected at least 2 samples per prompt: {kind} compares them")
    _check_rewards(rewards, n)
    rewards = widen(rewards.detach())
    if rewards.ndim == 1:
        if weights is not None or multi != "sum_then_normalize":
            raise ConfigError("weights, multi: got them for one reward per rollout, expected rewards (batch, R)")
        return _single(rewards, n, kind, eps).unsqueeze(1)
    factors = rewards.new_ones(rewards.shape[1]) if weights is None else rewards.new_tensor(weights)
    if factors.shape != rewards.shape[1:]:
        raise ConfigError(f"weights: got {len(factors)}, expected one for each of {rewards.shape[1]} rewards")
    scored = ~rewards.isnan().all(1)
    if multi == "sum_then_normalize":
        total = torch.where(scored, (rewards * factors).nansum(1), torch.nan)
        return _single(total, n, kind, eps).unsqueeze(1)
    if kind != "grpo":
        raise ConfigError(f"kind: got {kind!r} with multi='normalize_then_sum', expected 'grpo'")
    normalized = torch.stack([_single(reward, n, kind, eps) for reward in rewards.unbind(1)], dim=1)
    total = normalized @ factors
    deviation = (total.square().sum() / (scored.sum() - 1).clamp(min=1)).sqrt()
    return (total / (deviation + eps)).unsqueeze(1)


def tied_groups(rewards: Tensor, n: int) -> Tensor:
    """Say for each prompt, (batch / n,), whether its scored rewards are all equal: then it teaches nothing.

    Their share is worth logging; sampling prompts until enough are not tied is DAPO's dynamic sampling
    (arXiv 2503.14476, section 3.2).

    >>> tied_groups(torch.tensor([1.0, 1.0, 0.0, 1.0]), n=2).tolist()
    [True, False]
    """
    _check_rewards(rewards, n)
    if rewards.ndim != 1:
        raise ConfigError(f"rewards: got shape {tuple(rewards.shape)}, expected (batch,)")
    return _tied(widen(rewards).view(-1, n)).squeeze(1)


def _tied(groups: Tensor) -> Tensor:
    """Return (groups, 1): no two scored rewards differ."""
    unscored = groups.isnan()
    highest = groups.masked_fill(unscored, -torch.inf).amax(1, keepdim=True)
    return highest <= groups.masked_fill(unscored, torch.inf).amin(1, keepdim=True)


def _single(rewards: Tensor, n: int, kind: str, eps: float) -> Tensor:
    """Return the advantages (batch,) for one reward per rollout."""
    if kind == "reinforce":
        return rewards.nan_to_num(nan=0.0)
    groups = rewards.reshape(-1, n)
    scored = ~groups.isnan()
    count = scored.sum(1, keepdim=True)
    centred = torch.where(scored, groups - groups.nansum(1, keepdim=True) / count.clamp(min=1), 0.0)
    if kind == "rloo":
        centred = centred * count / (count - 1).clamp(min=1)
    elif kind == "grpo":
        centred = centred / ((centred.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)).sqrt() + eps)
    elif kind == "batch_std":
        mean = groups.nansum() / scored.sum().clamp(min=1)
        squares = torch.where(scored, groups - mean, 0.0).square().sum()
        centred = centred / ((squares / (scored.sum() - 1).clamp(min=1)).sqrt() + eps)
    return centred.masked_fill(_tied(groups), 0.0).flatten()


def _check_rewards(rewards: Tensor, n: int) -> None:
    check_count("n", n, 1)
    if rewards.ndim not in (1, 2) or not rewards.numel() or len(rewards) % n:
        raise ConfigError(
            f"rewards: got shape {tuple(rewards.shape)}, expected (batch,) or (batch, R), batch a multiple of n = {n}"
        )
    if bool(rewards.isinf().any()):
        raise ConfigError("rewards: got an infinite one, expected numbers, or NaN where not scored")
