"""Ratios and weights by hand, their gradients, and what truncated sampling does to them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from effml_rl.importance_weights import effective_sample_size, importance_ratio, mismatch_weights
from effml_shared.errors import ConfigError
from effml_shared.generation import filter_logits
from torch import Tensor

F64 = torch.float64
MASK = torch.tensor([[True, True, True], [True, True, False]])
RATIOS = torch.tensor([[0.5, 2.0, 8.0], [0.25, 4.0, 1.0]], dtype=F64)
NEW = RATIOS.log().masked_fill(~MASK, math.nan)
OLD = torch.zeros(2, 3, dtype=F64).masked_fill(~MASK, math.inf)


def close(got: Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(got, torch.tensor(expected, dtype=F64))


def test_ratios_by_hand() -> None:
    close(importance_ratio(NEW, OLD, MASK), [[0.5, 2, 8], [0.25, 4, 1]])
    close(importance_ratio(NEW, OLD, MASK, level="sequence"), [[2.0], [1.0]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [[0.5, 2, 2], [0.25, 2, 1]]),
        ({"cap": 5.0}, [[0.5, 2, 5], [0.25, 4, 1]]),
        ({"kind": "mask", "cap": 5.0}, [[0.5, 2, 0], [0.25, 4, 1]]),
        ({"kind": "mask", "cap": 5.0, "floor": 0.3}, [[0.5, 2, 0], [0, 4, 1]]),
        ({"level": "sequence", "cap": 3.0}, [[3.0], [1.0]]),
        ({"level": "sequence", "cap": 10.0}, [[8.0], [1.0]]),
        ({"level": "sequence", "kind": "mask", "cap": 3.0}, [[0.0], [1.0]]),
    ],
)
def test_mismatch_weights_by_hand(options: dict[str, Any], expected: list[list[float]]) -> None:
    close(mismatch_weights(NEW, OLD, MASK, **options), expected)


def test_ratios_are_differentiated_and_weights_are_not() -> None:
    logps = NEW.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(importance_ratio(logps, OLD, MASK).sum(), logps)
    close(gradient, [[0.5, 2, 8], [0.25, 4, 0]])
    (gradient,) = torch.autograd.grad(importance_ratio(logps, OLD, MASK, level="sequence").sum(), logps)
    close(gradient, [[2 / 3, 2 / 3, 2 / 3], [0.5, 0.5, 0]])
    assert not mismatch_weights(logps, OLD, MASK).requires_grad


def test_huge_differences_stay_finite() -> None:
    logps = torch.tensor([[500.0, -500.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    ratio = importance_ratio(logps, torch.zeros(1, 2), mask)
    assert ratio[0].tolist() == pytest.approx([math.exp(20), math.exp(-20)], rel=1e-5)
    (gradient,) = torch.autograd.grad(ratio.sum(), logps)
    assert gradient.tolist() == [[0.0, 0.0]]


def test_truncated_sampling_biases_weights_by_the_kept_mass() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=F64)
    kept = filter_logits(logits, top_p=0.8)
    probabilities, sampled = logits.softmax(-1), kept.softmax(-1)
    drawn = sampled > 0
    mass = float(probabilities[drawn].sum())
    weights = mismatch_weights(logits.log_softmax(-1), sampled.log(), drawn, cap=10.0)
    assert mass < 1.0
    torch.testing.assert_close(weights[drawn], torch.full_like(weights[drawn], mass))


def test_effective_sample_size() -> None:
    weights = torch.tensor([[3.0, 1.0], [1.0, math.nan]])
    mask = torch.tensor([[True, True], [True, False]])
    assert float(effective_sample_size(weights, mask)) == pytest.approx(25 / 11)
    assert float(effective_sample_size(torch.full((5, 2), 0.3), torch.ones(5, 2, dtype=torch.bool))) == pytest.approx(
        10
    )
    assert float(effective_sample_size(torch.zeros(3), torch.ones(3, dtype=torch.bool))) == 0.0


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match=r"level: got 'row'"):
        importance_ratio(NEW, OLD, MASK, level="row")
    with pytest.raises(ConfigError, match=r"old_logps: got shape \(3,\)"):
        importance_ratio(NEW, OLD[0], MASK)
    with pytest.raises(ConfigError, match=r"kind: got 'clip'"):
        mismatch_weights(NEW, OLD, MASK, kind="clip")
    with pytest.raises(ConfigError, match=r"floor: got 3\.0"):
        mismatch_weights(NEW, OLD, MASK, kind="mask", floor=3.0)
    with pytest.raises(ConfigError, match=r"floor: got 0\.5 with kind 'truncate'"):
        mismatch_weights(NEW, OLD, MASK, floor=0.5)
    with pytest.raises(ConfigError, match=r"weights: got shape \(2,\)"):
        effective_sample_size(torch.ones(2), torch.ones(3, dtype=torch.bool))
