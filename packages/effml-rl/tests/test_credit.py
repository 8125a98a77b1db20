"""Credit: each estimator is the function of its name on the right rewards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_rl.advantages import advantages
from effml_rl.credit import assign_credit, total_rewards
from effml_rl.gae import gae, reinforce_pp, whiten
from effml_rl.policy_config import PolicyConfig
from effml_rl.rewards import token_rewards
from effml_shared.errors import ConfigError
from torch import Tensor

NAN = float("nan")
REWARDS = torch.tensor([[1.0], [0.0], [0.0], [1.0], [0.0], [0.0], [0.0], [0.0]])
LENGTHS = torch.tensor([3, 1, 2, 3, 3, 2, 1, 3])
MASK = torch.arange(3) < LENGTHS[:, None]
KL = torch.linspace(-1, 1, 24).view(8, 3)


def credit(rewards: Tensor = REWARDS, mask: Tensor = MASK, kl: Any = None, values: Any = None, **fields: Any) -> Any:
    config = PolicyConfig(**{"samples": 4, "max_completion": 3, **fields})
    return assign_credit(rewards, LENGTHS, mask, config, kl=kl, values=values)


@pytest.mark.parametrize("estimator", ["reinforce", "group_mean", "rloo", "grpo", "batch_std"])
def test_group_estimators(estimator: str) -> None:
    assert credit(estimator=estimator).advantages.equal(advantages(REWARDS[:, 0], 4, estimator))


def test_oracle_of_eight_rewards() -> None:
    got = credit(samples=8).advantages.flatten()
    torch.testing.assert_close(got, torch.where(REWARDS[:, 0] > 0, 1.619835, -0.539945), atol=1e-6, rtol=0)


def test_a_kl_in_the_reward_is_summed_over_a_completion() -> None:
    got = credit(kl=KL, kl_reward=0.1, estimator="rloo").advantages
    expected = REWARDS[:, 0] - 0.1 * (KL * MASK).sum(1)
    torch.testing.assert_close(got, advantages(expected, 4, "rloo"))


def test_reinforce_pp_and_gae_see_rewards_of_tokens() -> None:
    per_token = token_rewards(REWARDS[:, 0], MASK, KL, beta=0.1)
    got = credit(kl=KL, kl_reward=0.1, estimator="reinforce_pp")
    torch.testing.assert_close(got.advantages, reinforce_pp(per_token, MASK), atol=1e-6, rtol=0)
    assert got.returns is None
    values = torch.randn(8, 3)
    adv, returns = gae(per_token, values, MASK, gamma=0.9, lam=0.8)
    got = credit(kl=KL, kl_reward=0.1, values=values, estimator="gae", gamma=0.9, lam=0.8)
    torch.testing.assert_close(got.advantages, whiten(adv, MASK), atol=1e-6, rtol=0)
    assert got.returns.equal(returns)
    plain = credit(kl=KL, kl_reward=0.1, values=values, estimator="gae", gamma=0.9, lam=0.8, whiten=False)
    assert plain.advantages.equal(adv)


def test_group_advantages_may_be_whitened_over_tokens() -> None:
    got = credit(whiten=True).advantages
    torch.testing.assert_close(got, whiten(advantages(REWARDS[:, 0], 4).expand(8, 3), MASK), atol=1e-6, rtol=0)


def test_the_overlong_penalty_joins_the_reward() -> None:
    got = credit(overlong_margin=2, estimator="reinforce").advantages.flatten()
    assert got.tolist() == [0.0, 0.0, -0.5, 0.0, -1.0, -0.5, 0.0, -1.0]


def test_several_verifiers() -> None:
    two = torch.cat([REWARDS, LENGTHS.float().unsqueeze(1)], 1)
    got = credit(two, reward_weights=(1.0, 0.5)).advantages
    assert got.equal(advantages(REWARDS[:, 0] + LENGTHS / 2, 4))
    got = credit(two, multi="normalize_then_sum").advantages
    assert got.equal(advantages(two, 4, weights=[1.0, 1.0], multi="normalize_then_sum"))
    three = torch.cat([two, -0.1 * (KL * MASK).sum(1, keepdim=True)], 1)
    got = credit(two, multi="normalize_then_sum", kl=KL, kl_reward=0.1).advantages
    torch.testing.assert_close(got, advantages(three, 4, multi="normalize_then_sum", weights=[1.0] * 3))


def test_what_was_not_scored_has_no_advantage_and_no_part() -> None:
    rewards = REWARDS.clone()
    rewards[1] = NAN
    mask = MASK & ~rewards.isnan()
    for fields in ({"overlong_margin": 2}, {"kl": KL, "kl_reward": 0.1}):
        got = credit(rewards, mask, **fields).advantages.flatten()
        assert got[1] == 0
        torch.testing.assert_close(got[:4].sum(), torch.tensor(0.0), atol=1e-6, rtol=0)
        assert not got.isnan().any()
    token = credit(rewards, mask, estimator="reinforce_pp").advantages
    assert token[1].eq(0).all()


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match=r"kl, values: got one too few or too many"):
        credit(kl=KL)
    with pytest.raises(ConfigError, match=r"kl, values: got one too few or too many"):
        credit(estimator="gae")
    with pytest.raises(ConfigError, match=r"reward_weights: got 2, expected one for each of 1 verifiers"):
        total_rewards(REWARDS, [1.0, 2.0])
