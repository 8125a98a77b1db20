"""Presets say what their papers say, and what does not fit together is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
from effml_rl.policy_config import PolicyConfig, cispo, dapo, dr_grpo, grpo, gspo, ppo, reinforce_pp, rloo, sapo
from effml_shared.config import load_config
from effml_shared.errors import ConfigError


def test_presets() -> None:
    assert (grpo().estimator, grpo().loss, grpo().token_reduction) == ("grpo", "ppo", "seq_mean_token_mean")
    assert (dr_grpo().estimator, dr_grpo().token_reduction, dr_grpo().max_len) == ("group_mean", "dr_grpo", 512)
    assert (dapo().clip, dapo().token_reduction, dapo().refills) == ((0.2, 0.28), "token_mean", 3)
    assert dapo(max_completion=20480).overlong_margin == 4096
    assert [preset().loss for preset in (gspo, cispo, sapo)] == ["gspo", "cispo", "sapo"]
    assert [preset().token_reduction for preset in (gspo, cispo, sapo)] == [
        "seq_mean_token_mean",
        "token_mean",
        "seq_mean_token_mean",
    ]
    assert (rloo().estimator, rloo().token_reduction) == ("rloo", "seq_mean_token_sum")
    assert (reinforce_pp().samples, reinforce_pp().whitened, grpo().whitened) == (1, True, False)
    assert (ppo().estimator, ppo().whitened, ppo(whiten=False).whitened) == ("gae", True, False)
    assert not any(preset().needs_reference for preset in (grpo, dr_grpo, dapo, rloo, ppo, reinforce_pp))


def test_overrides_win_and_updates_are_counted() -> None:
    config = dapo(refills=0, epochs=3, mini_batches=2, kl_loss=0.1)
    assert (config.refills, config.updates, config.needs_reference) == (0, 6, True)


def test_it_is_a_schema_of_the_command_line() -> None:
    config = load_config(grpo(), overrides=["samples=4", "clip=[0.2,0.3]", "reward_weights=[1.0,0.5]", "whiten=true"])
    assert (config.samples, tuple(config.clip or ()), config.whitened) == (4, (0.2, 0.3), True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kl_loss": 0.1, "kl_reward": 0.2}, r"kl_loss, kl_reward: got 0\.1 and 0\.2, expected one of them at most"),
        ({"kl_kind": "k1"}, r"kl_kind: got 'k1', expected another"),
        ({"samples": 1}, r"samples: got 1, expected at least 2: grpo compares them"),
        ({"estimator": "gae", "samples": 1, "refills": 1}, r"one sample is always tied"),
        ({"multi": "normalize_then_sum", "estimator": "rloo"}, r"multi: got 'normalize_then_sum' with 'rloo'"),
        ({"temperature": 0.0}, r"temperature: got 0\.0, expected a number > 0"),
        ({"temperature": float("nan")}, r"temperature: got nan"),
        ({"clip": (0.2, 1.0)}, r"clip\[1\]: got 1\.0"),
        ({"clip": (0.2, 0.2), "loss": "sapo"}, r"clip, dual_clip: got one with kind 'sapo'"),
        ({"loss": "gspo", "reduction": "token_mean"}, r"reduction: got 'token_mean' with loss 'gspo'"),
        ({"overlong_margin": 9, "max_completion": 8}, r"overlong_margin: got 9, expected at most max_completion"),
        ({"micro_batch": 0}, r"micro_batch: got 0, expected an integer of at least 1"),
        ({"epochs": 0}, r"epochs: got 0"),
        ({"estimator": "a2c"}, r"estimator: got 'a2c', expected one of 'reinforce'"),
        ({"entropy": -1.0}, r"entropy: got -1\.0"),
        ({"precision": "fp8"}, r"precision: got 'fp8'"),
        ({"lr": "1e-3"}, r"lr: got '1e-3', expected a number"),
        ({"clip": 0.2}, r"clip: got 0\.2, expected two numbers"),
        ({"clip": (0.2,)}, r"clip: got \(0\.2,\), expected two numbers"),
        ({"gamma": 1.5}, r"gamma: got 1\.5, expected a number in \[0, 1\]"),
        ({"lam": float("nan")}, r"lam: got nan"),
        ({"clip_norm": 0.0}, r"clip_norm: got 0\.0, expected a number > 0"),
        ({"value_clip": -1.0}, r"value_clip: got -1\.0"),
        ({"reward_limit": float("nan")}, r"reward_limit: got nan"),
        ({"mismatch_cap": 0.0}, r"mismatch_cap: got 0\.0"),
        ({"mismatch_floor": 3.0}, r"mismatch_floor: got 3\.0, expected at most mismatch_cap"),
    ],
)
def test_what_does_not_fit_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        PolicyConfig(**fields)
    assert "\n" not in str(caught.value)


def test_unknown_options_of_a_preset_are_named() -> None:
    with pytest.raises(ConfigError, match=r"option: got 'sample', expected one of 'prompts_per_step', 'samples'"):
        grpo(sample=4)
    with pytest.raises(ConfigError, match=r"max_completion: got None"):
        dapo(max_completion=None)
