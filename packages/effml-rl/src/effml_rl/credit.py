"""Credit assignment: from rewards of completions to advantages of completions or tokens, over all ranks.

    group estimators   advantages of `effml_rl.advantages` from r_i - beta sum_t k1_t       (rows, 1)
    reinforce_pp       sums of the token rewards from each token on, whitened               (rows, T)
    gae                generalised advantages of the token rewards, given values            (rows, T)

Token rewards are -beta k1_t everywhere and r_i at the last token, see `token_rewards`. A completion's r_i is the
weighted sum of what the verifiers said and of the overlong penalty. A completion that no verifier scored is left out:
its tokens should not be counted in the mask. Cost: O(rows x T).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_rl.advantages import advantages
from effml_rl.gae import gae
from effml_rl.policy_config import TOKEN_ESTIMATORS, PolicyConfig
from effml_rl.rank_statistics import RankRows, whiten
from effml_rl.rewards import overlong_penalty, token_rewards

__all__ = ["Credit", "assign_credit", "total_rewards"]


class Credit(NamedTuple):
    """What the policy and the critic learn from."""

    advantages: Tensor  # (rows, 1) or (rows, T)
    returns: Tensor | None = None  # (rows, T), of gae


def total_rewards(rewards: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """Return the weighted sum (rows,) of rewards (rows, R): NaN where all are, else a missing one counts 0.

    >>> total_rewards(torch.tensor([[1.0, 2.0], [1.0, torch.nan], [torch.nan, torch.nan]]), [1.0, 0.5]).tolist()
    [2.0, 1.0, nan]
    """
    factors = rewards.new_ones(rewards.shape[1]) if weights is None else rewards.new_tensor(list(weights))
    if factors.shape != rewards.shape[1:]:
        raise ConfigError(f"reward_weights: got {len(factors)}, expected one for each of {rewards.shape[1]} verifiers")
    return torch.where(rewards.isnan().all(1), torch.nan, (rewards * factors).nansum(1))


def assign_credit(
    rewards: Tensor,
    lengths: Tensor,
    mask: Tensor,
    config: PolicyConfig,
    *,
    kl: Tensor | None = None,
    values: Tensor | None = None,
) -> Credit:
    """Return advantages, and returns where there are values.

    Args:
        rewards: (rows, R) of R verifiers, NaN where not scored; the samples of a prompt are neighbours.
        lengths: (rows,) tokens of the completions.
        mask: (rows, T) bool of the tokens to learn from.
        kl: (rows, T) `k1` of the policy that sampled to the reference, with `config.kl_reward`.
        values: (rows, T) of the critic, with the estimator `"gae"`.

    Raises:
        ConfigError: kl or values missing or not asked for, or not one weight per verifier.
    """
    if (kl is None) != (not config.kl_reward) or (values is None) != (config.estimator != "gae"):
        raise ConfigError("kl, values: got one too few or too many, expected kl with kl_reward and values with 'gae'")
    rewards, lengths = rewards.detach().cpu(), lengths.cpu()
    total = total_rewards(rewards, config.reward_weights)
    penalty = torch.zeros_like(total)
    if config.overlong_margin is not None:
        penalty = penalty + overlong_penalty(lengths, config.max_completion, config.overlong_margin)
    returns = None
    if config.estimator in TOKEN_ESTIMATORS:
        reward = (total + penalty).to(mask.device)
        per_token = token_rewards(reward, mask, kl, beta=config.kl_reward, limit=config.reward_limit)
        if values is None:
            credit, _ = gae(per_token, torch.zeros_like(per_token), mask, gamma=config.gamma, lam=1.0)
        else:
            credit, returns = gae(per_token, values, mask, gamma=config.gamma, lam=config.lam)
    else:
        if kl is not None:
            penalty = penalty - config.kl_reward * torch.where(mask, kl, 0.0).sum(1).cpu()
        credit = _group_advantages(rewards, total, penalty, config).to(mask.device)
    if config.whitened:
        credit = whiten(credit.expand(mask.shape), mask)
    return Credit(credit, returns)


def _group_advantages(rewards: Tensor, total: Tensor, penalty: Tensor, config: PolicyConfig) -> Tensor:
    """Return the advantages (rows, 1), with statistics of a batch over all ranks."""
    ranks = RankRows(len(rewards))
    if config.multi == "normalize_then_sum" and rewards.shape[1] > 1:
        weights = list(config.reward_weights or [1.0] * rewards.shape[1])
        if config.overlong_margin is not None or config.kl_reward:
            rewards = torch.cat([rewards, (penalty + 0 * total).unsqueeze(1)], dim=1)  # NaN where not scored
            weights.append(1.0)
        whole = ranks.gather(rewards)
        options: dict[str, Any] = {"weights": weights, "multi": config.multi}
    else:
        whole, options = ranks.gather(total + penalty), {}
    if not len(whole):
        return total.unsqueeze(1)
    return ranks.own(advantages(whole, config.samples, config.estimator, eps=config.eps, **options))
