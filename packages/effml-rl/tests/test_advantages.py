"""Group advantages against hand-computed numbers, against a plain loop, and under bad input."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from effml_rl.advantages import KINDS, advantages, tied_groups
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

F64 = torch.float64
NAN = math.nan
GROUP_KINDS = [kind for kind in KINDS if kind != "reinforce"]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def naive(rewards: list[float], n: int, kind: str, eps: float) -> list[float]:
    """Return the advantages with the standard library's statistics, one rollout at a time."""
    everything = [r for r in rewards if not math.isnan(r)]
    result = []
    for start in range(0, len(rewards), n):
        group = rewards[start : start + n]
        scored = [r for r in group if not math.isnan(r)]
        for r in group:
            if math.isnan(r):
                result.append(0.0)
            elif kind == "reinforce":
                result.append(r)
            elif len(set(scored)) < 2:
                result.append(0.0)
            elif kind == "rloo":
                result.append(r - (sum(scored) - r) / (len(scored) - 1))
            else:
                scale = {
                    "group_mean": 1.0,
                    "grpo": statistics.stdev(scored) + eps,
                    "batch_std": statistics.stdev(everything) + eps,
                }[kind]
                result.append((r - statistics.fmean(scored)) / scale)
    return result


@pytest.mark.parametrize(
    ("kind", "eps", "right", "wrong"),
    [
        ("grpo", 1e-4, 1.619835, -0.539945),
        ("grpo", 1e-9, 1.620185, -0.540062),
        ("group_mean", 1e-4, 0.75, -0.25),
        ("rloo", 1e-4, 0.857143, -0.285714),
    ],
)
def test_two_of_eight_correct(kind: str, eps: float, right: float, wrong: float) -> None:
    rewards = tensor(1, 0, 0, 1, 0, 0, 0, 0)
    assert abs(float(rewards.std()) - 0.462910) < 1e-6
    expected = (wrong + (right - wrong) * rewards).unsqueeze(1)
    torch.testing.assert_close(advantages(rewards, 8, kind, eps=eps), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("rloo", (-8 / 3, -4 / 3, 0, 4)),
        ("group_mean", (-2, -1, 0, 3)),
        ("grpo", (-0.925777, -0.462889, 0, 1.388666)),
    ],
)
def test_graded_rewards(kind: str, expected: tuple[float, ...]) -> None:
    result = advantages(tensor(1, 2, 3, 6), 4, kind)
    torch.testing.assert_close(result, tensor(*expected).unsqueeze(1), atol=1e-6, rtol=0)


@given(
    rewards=st.lists(st.one_of(st.integers(-3, 3).map(float), st.just(NAN)), min_size=12, max_size=12),
    n=st.sampled_from([2, 3, 4, 6, 12]),
    kind=st.sampled_from(KINDS),
)
def test_equals_the_plain_loop(rewards: list[float], n: int, kind: str) -> None:
    expected = tensor(*naive(rewards, n, kind, 1e-4)).unsqueeze(1)
    torch.testing.assert_close(advantages(tensor(*rewards), n, kind), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", GROUP_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_equal_rewards_give_exactly_zero(kind: str, dtype: torch.dtype) -> None:
    rewards = torch.tensor([0.3] * 8 + [0.1, 0.9] * 4, dtype=dtype)
    result = advantages(rewards, 8, kind, eps=1e-9)
    assert result[:8].eq(0).all()
    assert result[8:].ne(0).all()
    assert tied_groups(rewards, 8).tolist() == [True, False]


def test_unscored_rollouts_leave_the_others_alone() -> None:
    result = advantages(tensor(NAN, 1, 2, 3, 6, NAN), 6, "rloo").flatten()
    torch.testing.assert_close(result, tensor(0, -8 / 3, -4 / 3, 0, 4, 0))
    for kind in KINDS:
        assert advantages(tensor(NAN, NAN, NAN, 5.0), 2, kind).flatten().tolist()[:3] == [0.0, 0.0, 0.0]
    assert tied_groups(tensor(NAN, NAN, NAN, 5.0, 0.0, 1.0), 2).tolist() == [True, True, False]


def test_ints_bools_and_strided_rewards() -> None:
    strided = torch.tensor([[1, 9], [0, 9], [0, 9], [1, 9]])[:, 0]
    for rewards in (strided, strided.bool(), strided.float()):
        assert advantages(rewards, 2, "group_mean").flatten().tolist() == [0.5, -0.5, -0.5, 0.5]
        assert advantages(rewards, 2).dtype == torch.float32


def test_no_gradient_flows_into_rewards() -> None:
    assert not advantages(tensor(0, 1).requires_grad_(), 2).requires_grad


def test_several_rewards_summed_first() -> None:
    rewards = torch.stack([tensor(1, 0, NAN, 1), tensor(0.5, NAN, NAN, 0)], dim=1)
    summed = tensor(2.5, 0, NAN, 2)
    assert advantages(rewards, 4, weights=[2, 1]).equal(advantages(summed, 4))


def test_several_rewards_normalized_first() -> None:
    torch.manual_seed(0)
    rewards = torch.rand(12, 3, dtype=F64) * tensor(1, 10, 100)
    groups = rewards.view(3, 4, 3)
    each = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    total = (each * tensor(1, 0.5, 2)).sum(-1).flatten()
    expected = (total - total.mean()) / (total.std() + 1e-4)
    result = advantages(rewards, 4, weights=[1, 0.5, 2], multi="normalize_then_sum").squeeze(1)
    torch.testing.assert_close(result, expected)


def test_a_tied_group_stays_zero_when_normalized_first() -> None:
    rewards = torch.stack([tensor(1, 0, 0.3, 0.3, NAN, 1), tensor(2, 2, 5, 5, NAN, 0)], dim=1)
    result = advantages(rewards, 2, multi="normalize_then_sum").flatten().tolist()
    assert result[2:] == [0.0] * 4
    assert result[0] == -result[1] != 0.0


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_one_sample_per_prompt_needs_reinforce(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"n: got 1, expected at least 2"):
        advantages(tensor(1, 2), 1, kind)
    assert advantages(tensor(1, 2), 1, "reinforce").flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("rewards", "options", "message"),
    [
        (torch.ones(6), {"n": 4}, r"batch a multiple of n = 4"),
        (torch.ones(0), {"n": 4}, r"rewards: got shape \(0,\)"),
        (torch.tensor(1.0), {"n": 2}, r"rewards: got shape \(\)"),
        (torch.ones(4), {"n": 0, "kind": "reinforce"}, r"n: got 0"),
        (torch.ones(4), {"n": 2, "kind": "ppo"}, r"kind: got 'ppo', expected one of 'reinforce'"),
        (torch.ones(4), {"n": 2, "eps": -1.0}, r"eps"),
        (torch.tensor([1.0, math.inf]), {"n": 2}, r"infinite"),
        (torch.ones(4), {"n": 2, "weights": [1.0]}, r"weights, multi"),
        (torch.ones(4, 2), {"n": 2, "weights": [1.0]}, r"weights: got 1, expected one for each of 2"),
        (torch.ones(4, 2), {"n": 2, "multi": "mean"}, r"multi: got 'mean'"),
        (torch.ones(4, 2), {"n": 2, "multi": "normalize_then_sum", "kind": "rloo"}, r"expected 'grpo'"),
    ],
)
def test_bad_input_is_named(rewards: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        advantages(rewards, **options)  # type: ignore[arg-type]
