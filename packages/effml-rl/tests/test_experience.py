"""Experience: the right numbers in the rows, and no pass that nobody needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_rl.advantages import advantages
from effml_rl.experience import Experience
from effml_rl.gae import gae
from effml_rl.kl import kl
from effml_rl.policy_config import PolicyConfig, grpo, ppo
from effml_rl.policy_passes import policy_logps
from effml_rl.prompts import Prompt
from effml_rl.reference import Reference
from effml_rl.rewards import token_rewards
from effml_rl.rollout_batch import RolloutBatch
from effml_rl.rollouts import Rollouts, Scores
from effml_rl.value_model import ValueModel
from effml_shared.errors import ConfigError, EffmlError
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn

NAN = float("nan")
REWARDS = [1.0, 0.0, 0.0, 0.0, NAN, 1.0]  # of three prompts: one teaches, one is tied, one has a single score
LENGTHS = torch.tensor([4, 1, 3, 2, 4, 2])


def transformer(seed: int = 3) -> Transformer:
    return Transformer(TransformerConfig(n_layers=1, d_model=16, n_heads=2, d_ff=24, vocab_size=11), seed=seed)


def rollouts(rewards: list[float] = REWARDS, sampler_logps: bool = True) -> Rollouts:
    generator = torch.Generator().manual_seed(0)
    rows = len(rewards)
    batch = RolloutBatch(
        prompt_ids=torch.arange(rows)[:, None] // 2,  # too short to be read once for all
        prompt_mask=torch.ones(rows, 1, dtype=torch.bool),
        completion_ids=torch.randint(0, 11, (rows, 4), generator=generator),
        completion_mask=torch.arange(4) < LENGTHS[:rows, None],
        truncated=LENGTHS[:rows] == 4,
        group_index=torch.arange(rows) // 2,
        sampler_logps=torch.randn(rows, 4, generator=generator) if sampler_logps else None,
    )
    return Rollouts([Prompt("?")] * rows, batch, ["!"] * rows, Scores(torch.tensor(rewards).unsqueeze(1)))


def passes(module: nn.Module) -> list[int]:
    """Return a list that grows by the number of rows with each pass of a module."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def make(config: PolicyConfig, **options: Any) -> tuple[dict[str, Tensor], dict[str, float], list[int], list[int]]:
    """Return rows, metrics, and the rows of all passes of the policy and of the reference."""
    policy = transformer()
    reference = Reference(policy, transformer(4)) if config.needs_reference else None
    critic = ValueModel.of(transformer(5)) if config.estimator == "gae" else None
    if critic is not None:
        nn.init.normal_(critic.head.weight)
    own, theirs = passes(policy), passes(reference.model if reference else nn.Identity())
    rows, metrics = Experience(policy, config, reference, critic)(rollouts(**options), "float32")
    return rows, metrics, own, theirs


def config(**fields: Any) -> PolicyConfig:
    return grpo(samples=2, max_completion=4, **fields)


def test_one_update_needs_no_pass() -> None:
    rows, metrics, own, _ = make(config())
    assert own == []
    assert metrics == {}
    assert set(rows) == {"prompt_ids", "prompt_mask", "completion_ids", "loss_mask", "group", "advantages", "live"}
    assert rows["advantages"].equal(advantages(torch.tensor(REWARDS), 2))
    assert rows["live"].tolist() == [True, True, False, False, False, False]
    assert rows["loss_mask"].sum(1).tolist() == [4, 1, 3, 2, 0, 2]


def test_several_updates_need_the_old_policy_on_live_rows() -> None:
    rows, _, own, _ = make(config(epochs=2))
    assert own == [2]
    expected = policy_logps(transformer(), rows, temperature=1.0).logps
    live = rows["loss_mask"] & rows["live"][:, None]
    torch.testing.assert_close(rows["old_logps"][live], expected[live])
    assert not rows["old_logps"].requires_grad
    rows, _, own, _ = make(config(epochs=2, old_logps="sampler"))
    assert own == []
    sampled = rollouts().batch.sampler_logps
    assert sampled is not None
    assert rows["old_logps"].equal(sampled)


def test_a_penalty_makes_every_scored_row_live() -> None:
    rows, _, own, theirs = make(config(kl_loss=0.1))
    assert rows["live"].tolist() == [True, True, True, True, False, True]
    assert own == []
    assert theirs == [5]
    expected = policy_logps(transformer(4), rows, temperature=1.0).logps
    live = rows["loss_mask"] & rows["live"][:, None]
    torch.testing.assert_close(rows["ref_logps"][live], expected[live], atol=1e-6, rtol=0)
    assert make(config(entropy=0.1))[0]["live"].sum() == 5


def test_a_kl_in_the_reward_needs_both_and_serves_as_old() -> None:
    rows, metrics, own, theirs = make(config(kl_reward=0.1, epochs=2))
    assert own == theirs == [6]
    logps, ref = (policy_logps(transformer(seed), rows, temperature=1.0).logps.detach() for seed in (3, 4))
    mask = rows["loss_mask"]
    k1 = kl(logps, ref, "k1", mask=mask)
    torch.testing.assert_close(rows["old_logps"][mask], logps[mask], atol=1e-6, rtol=0)
    torch.testing.assert_close(rows["advantages"], advantages(torch.tensor(REWARDS) - 0.1 * k1.sum(1), 2))
    assert metrics["kl_k1"] == pytest.approx(float(k1.sum() / mask.sum()), abs=1e-6)


def test_a_critic_gives_values_and_returns() -> None:
    rows, metrics, _, _ = make(ppo(samples=2, max_completion=4, whiten=False))
    mask = rows["loss_mask"]
    assert rows["values"].shape == mask.shape
    per_token = token_rewards(torch.tensor(REWARDS), mask)
    expected, returns = gae(per_token, rows["values"], mask, lam=0.95)
    assert rows["advantages"].equal(expected)
    assert rows["returns"].equal(returns)
    assert metrics["explained_variance"] <= 1


def test_completions_that_were_cut_off_may_be_masked() -> None:
    rows, _, _, _ = make(config(mask_truncated=True))
    assert rows["loss_mask"].sum(1).tolist() == [0, 1, 3, 2, 0, 2]
    assert rows["advantages"].equal(advantages(torch.tensor(REWARDS), 2))  # its reward is part of the group's


def test_nothing_to_learn_from_is_said_in_one_line() -> None:
    with pytest.raises(
        EffmlError, match=r"got 2 completions without a reward and 0 cut off and masked, of 2"
    ) as caught:
        make(config(), rewards=[NAN, NAN])
    assert "\n" not in str(caught.value)
    with pytest.raises(EffmlError, match=r"got 1 completions without a reward and 1 cut off and masked, of 2"):
        make(config(mask_truncated=True), rewards=[1.0, NAN])
    rows, _, _, _ = make(config(), rewards=[])  # nothing was sampled: dynamic sampling found nothing
    assert len(rows["live"]) == 0


def test_numbers_of_the_sampler_are_asked_for_where_they_are_used() -> None:
    for fields in ({"mismatch": "mask"}, {"old_logps": "sampler", "epochs": 2}):
        assert "sampler_logps" in make(config(**fields))[0]
        with pytest.raises(ConfigError, match=r"sampler_logps: got rollouts without them"):
            make(config(**fields), sampler_logps=False)
