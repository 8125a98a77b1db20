"""GAE by doubling against hand-computed numbers and the textbook's backward recurrence; whitening."""

from __future__ import annotations

import math

import pytest
import torch
from effml_rl.gae import gae, reinforce_pp, whiten
from effml_rl.kl import kl
from effml_rl.rewards import token_rewards
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

F64 = torch.float64
REWARDS = torch.tensor([[0.0, 0, 0, 1]], dtype=F64)
VALUES = torch.tensor([[0.5, 0.6, 0.7, 0.8]], dtype=F64)
FULL = torch.ones(1, 4, dtype=torch.bool)


def naive(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Walk backwards through each row, stepping over masked slots."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for row in range(len(mask)):
        next_value = next_advantage = 0.0
        for t in reversed(range(mask.shape[1])):
            if mask[row, t]:
                value = float(values[row, t])
                next_advantage = float(rewards[row, t]) + gamma * next_value - value + gamma * lam * next_advantage
                next_value = value
                advantages[row, t], returns[row, t] = next_advantage, next_advantage + value
    return advantages, returns


@pytest.mark.parametrize(
    ("gamma", "lam", "advantages", "returns"),
    [
        (1.0, 1.0, [0.5, 0.4, 0.3, 0.2], [1.0, 1.0, 1.0, 1.0]),
        (1.0, 0.0, [0.1, 0.1, 0.1, 0.2], [0.6, 0.7, 0.8, 1.0]),
        (1.0, 0.95, [0.456725, 0.3755, 0.29, 0.2], [0.956725, 0.9755, 0.99, 1.0]),
        (0.9, 0.8, [0.14661760, 0.14808, 0.164, 0.2], None),
    ],
)
def test_by_hand(gamma: float, lam: float, advantages: list[float], returns: list[float] | None) -> None:
    result, targets = gae(REWARDS, VALUES, FULL, gamma=gamma, lam=lam)
    torch.testing.assert_close(result, torch.tensor([advantages], dtype=F64), atol=1e-9, rtol=0)
    if returns is not None:
        torch.testing.assert_close(targets, torch.tensor([returns], dtype=F64), atol=1e-9, rtol=0)


def test_kl_in_the_reward_by_hand() -> None:
    logps = torch.tensor([[-1.0, -2.0, -0.5, -0.3]], dtype=F64)
    ref = torch.tensor([[-1.2, -1.5, -0.7, -0.3]], dtype=F64)
    rewards = token_rewards(torch.ones(1, dtype=F64), FULL, kl(logps, ref, "k1"), beta=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.02, 0.05, -0.02, 1.0]], dtype=F64))
    expected = torch.tensor([[0.466175, 0.4065, 0.27, 0.2]], dtype=F64)
    torch.testing.assert_close(gae(rewards, VALUES, FULL)[0], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("garbage", [7.0, math.nan, math.inf])
def test_appended_masked_steps_change_nothing(garbage: float) -> None:
    extra = torch.full((1, 3), garbage, dtype=F64)
    mask = torch.cat([FULL, torch.zeros(1, 3, dtype=torch.bool)], 1)
    expected = gae(REWARDS, VALUES, FULL)
    result = gae(torch.cat([REWARDS, extra], 1), torch.cat([VALUES, extra], 1), mask)
    for got, wanted in zip(result, expected, strict=True):
        assert got[:, :4].equal(wanted)
        assert got[:, 4:].eq(0).all()


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 19),
    seed=st.integers(0, 10_000),
    gamma=st.sampled_from([0.0, 0.9, 1.0]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_equals_the_backward_walk_with_gaps(length: int, seed: int, gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 3, length, dtype=F64, generator=generator)
    mask = torch.rand(3, length, generator=generator) < 0.6
    garbage = torch.full_like(rewards, math.nan)
    result = gae(rewards.where(mask, garbage), values.where(mask, garbage), mask, gamma=gamma, lam=lam)
    for got, wanted in zip(result, naive(rewards, values, mask, gamma, lam), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


def test_long_rows_keep_float32_accuracy() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 2, 1000)
    mask = torch.rand(2, 1000) < 0.9
    got = gae(rewards, values, mask, lam=1.0)[0].double()
    wanted = naive(rewards.double(), values.double(), mask, 1.0, 1.0)[0]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_reinforce_pp_whitens_returns_to_go() -> None:
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = torch.tensor([[0.1, 0.2, 1.0], [-1.0, math.nan, math.nan]], dtype=F64)
    to_go = torch.tensor([1.3, 1.2, 1.0, -1.0], dtype=F64)
    expected = (to_go - to_go.mean()) / (to_go.var() + 1e-8).sqrt()
    result = reinforce_pp(rewards, mask)
    torch.testing.assert_close(result[mask], expected)
    assert result[~mask].eq(0).all()


def test_whitening_uses_counted_slots_only() -> None:
    torch.manual_seed(0)
    mask = torch.rand(4, 6) < 0.5
    values = torch.randn(4, 6, dtype=F64).masked_fill(~mask, math.nan)
    result = whiten(values, mask, eps=0.0)
    assert abs(float(result[mask].mean())) < 1e-15
    assert abs(float(result[mask].var()) - 1) < 1e-14
    assert whiten(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool)).eq(0).all()


def test_no_gradient_flows_into_values() -> None:
    values = VALUES.clone().requires_grad_()
    assert not any(x.requires_grad for x in gae(REWARDS, values, FULL))


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match=r"gamma: got 1\.5"):
        gae(REWARDS, VALUES, FULL, gamma=1.5)
    with pytest.raises(ConfigError, match=r"lam: got nan"):
        gae(REWARDS, VALUES, FULL, lam=math.nan)
    with pytest.raises(ConfigError, match=r"values: got shape \(4,\)"):
        gae(REWARDS, VALUES[0], FULL)
    with pytest.raises(ConfigError, match=r"mask: got torch\.float32"):
        gae(REWARDS, VALUES, FULL.float())
    with pytest.raises(ConfigError, match=r"mask: got 1 counted"):
        whiten(VALUES, torch.tensor([[True, False, False, False]]))
