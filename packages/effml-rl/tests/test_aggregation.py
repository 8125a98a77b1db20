"""Reductions by hand, and their invariance to how a step is cut into micro-batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from effml_rl.aggregation import REDUCTIONS, aggregate, count_terms
from effml_shared.errors import ConfigError
from effml_shared.schedules import Plan
from effml_shared.steps import GradientStep
from torch import Tensor, nn

F64 = torch.float64
MASK = torch.arange(6) < torch.tensor([[6], [2], [1]])
VALUES = torch.tensor([[1.0], [2.0], [3.0]], dtype=F64).expand(3, 6).masked_fill(~MASK, math.nan)


def max_len(reduction: str) -> int | None:
    return 6 if reduction == "dr_grpo" else None


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        ("token_mean", 1.444444),
        ("seq_mean_token_mean", 2.0),
        ("dr_grpo", 0.722222),
        ("seq_mean_token_sum", 4.333333),
    ],
)
def test_by_hand(reduction: str, expected: float) -> None:
    total, count = aggregate(VALUES, MASK, reduction, max_len=max_len(reduction))
    assert abs(float(total / count) - expected) < 1e-6
    assert count.equal(count_terms(MASK, reduction))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_add_up(reduction: str, size: int) -> None:
    parts = [
        aggregate(v, m, reduction, max_len=max_len(reduction))
        for v, m in zip(VALUES.split(size), MASK.split(size), strict=True)
    ]
    total, count = aggregate(VALUES, MASK, reduction, max_len=max_len(reduction))
    torch.testing.assert_close(sum(t for t, _ in parts), total)
    assert sum(int(c) for _, c in parts) == int(count)


def test_rows_without_tokens_count_for_dr_grpo_alone() -> None:
    mask = torch.cat([MASK, torch.zeros(1, 6, dtype=torch.bool)])
    assert [int(count_terms(mask, reduction)) for reduction in REDUCTIONS] == [9, 3, 3, 4]
    assert [int(count_terms(mask[3:], reduction)) for reduction in REDUCTIONS] == [0, 0, 0, 1]
    values = torch.full((1, 6), math.nan, requires_grad=True)
    for reduction in REDUCTIONS:
        total, _ = aggregate(values, mask[3:], reduction, max_len=max_len(reduction))
        (gradient,) = torch.autograd.grad(total, values)
        assert float(total.detach()) == 0.0
        assert gradient.eq(0).all()


class Scores(nn.Module):
    """One learned number per token id: the smallest policy that has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.linspace(-1, 1, 6, dtype=F64))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_gradient_step_does_not_see_its_micro_batches(reduction: str) -> None:
    def loss(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return aggregate(model(batch["ids"]).square(), batch["mask"], reduction, max_len=max_len(reduction))

    batch = {"ids": torch.arange(18).view(3, 6) * 5 % 6, "mask": MASK}
    results = []
    for size in (None, 1, 2):
        model = Scores()
        step = GradientStep(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, micro_batch=size)
        metrics = step(batch, Plan(lr_factor=1.0, batch_size=3))
        results.append((model.table.detach(), metrics["loss"]))
    for table, value in results[1:]:
        torch.testing.assert_close(table, results[0][0], atol=1e-15, rtol=0)
        assert abs(value - results[0][1]) < 1e-15


@pytest.mark.parametrize(
    ("values", "mask", "options", "message"),
    [
        (VALUES, MASK, {"reduction": "mean"}, r"reduction: got 'mean'"),
        (VALUES, MASK, {"reduction": "dr_grpo"}, r"max_len: got None"),
        (VALUES, MASK, {"reduction": "dr_grpo", "max_len": 0}, r"max_len: got 0"),
        (VALUES, MASK, {"max_len": 6}, r"max_len: got 6 with reduction 'token_mean'"),
        (VALUES[:2], MASK, {}, r"values: got shape \(2, 6\)"),
        (VALUES, MASK.float(), {}, r"mask: got torch\.float32"),
    ],
)
def test_bad_input_is_named(values: Tensor, mask: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        aggregate(values, mask, **options)
