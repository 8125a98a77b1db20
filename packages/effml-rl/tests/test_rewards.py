"""Rewards: None against NaN, penalties by hand, and where a completion's reward is placed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from effml_rl.rewards import overlong_penalty, stack_rewards, token_rewards
from effml_shared.errors import ConfigError

MASK = torch.tensor([[True, True, False, False], [True, False, True, False], [False] * 4])


def test_none_becomes_nan_and_nothing_else_may() -> None:
    rewards = stack_rewards([1, None, 0.5, True])
    assert rewards.dtype == torch.float32
    assert rewards.nan_to_num(nan=-9.0).tolist() == [1.0, -9.0, 0.5, 1.0]
    assert stack_rewards([1.0, 0.0, 1.0], [None, 2.0, 3.0]).nan_to_num(nan=-9.0).tolist() == [[1, -9], [0, 2], [1, 3]]
    assert stack_rewards([]).shape == (0,)
    for bad in (math.nan, math.inf):
        with pytest.raises(ConfigError, match=r"rewards\[1\]: got (nan|inf), expected a finite number, or None"):
            stack_rewards([0.0, bad])
    with pytest.raises(ConfigError, match=r"got \[1, 2\] values"):
        stack_rewards([1.0], [1.0, 2.0])
    with pytest.raises(ConfigError, match=r"got \[\] values"):
        stack_rewards()


def test_overlong_penalty_with_the_published_lengths() -> None:
    lengths = torch.tensor([0, 16384, 17408, 18432, 20480, 30000])
    assert overlong_penalty(lengths, 20480, 4096).tolist() == [0, 0, -0.25, -0.5, -1, -1]
    with pytest.raises(ConfigError, match=r"max_len: got 5"):
        overlong_penalty(lengths, 5, 6)
    with pytest.raises(ConfigError, match=r"margin: got 0"):
        overlong_penalty(lengths, 5, 0)


def test_the_reward_is_at_the_last_counted_token() -> None:
    rewards = torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    assert token_rewards(rewards, MASK).tolist() == [[0, 0.5, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 0]]


def test_kl_is_charged_on_counted_tokens_and_ignores_garbage() -> None:
    divergence = torch.tensor([[0.1, 0.2, math.nan, math.inf], [0.3, math.nan, 0.4, 0.5], [math.nan] * 4])
    result = token_rewards(torch.tensor([1.0, 0.0, 0.0]), MASK, divergence.requires_grad_(), beta=0.5)
    expected = torch.tensor([[-0.05, 0.9, 0, 0], [-0.15, 0, -0.2, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(result, expected)
    assert not result.requires_grad


def test_rewards_are_clamped_and_unscored_ones_are_zero() -> None:
    rewards = torch.tensor([50.0, math.nan, 0.0])
    assert token_rewards(rewards, MASK).sum(1).tolist() == [10.0, 0.0, 0.0]
    assert token_rewards(rewards, MASK, limit=None).sum(1).tolist() == [50.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 1), {}, r"rewards: got shape \(3, 1\), expected \(3,\)"),
        ((2,), {}, r"rewards: got shape \(2,\)"),
        ((3,), {"beta": 0.1}, r"kl, beta: got no kl with beta 0\.1"),
        ((3,), {"kl": torch.zeros(3, 4)}, r"kl, beta: got kl with beta 0\.0"),
        ((3,), {"kl": torch.zeros(3), "beta": 0.1}, r"kl: got shape \(3,\)"),
        ((3,), {"beta": -0.1}, r"beta: got -0\.1"),
    ],
)
def test_bad_input_is_named(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        token_rewards(torch.ones(shape), MASK, **options)
