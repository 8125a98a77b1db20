"""The clipped value loss by hand, and its indifference to masked slots."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from effml_rl.value_loss import value_loss
from effml_shared.errors import ConfigError

OLD = torch.zeros(1, 4, dtype=torch.float64)
VALUES = torch.tensor([[0.1, 0.5, -0.5, 0.5]], dtype=torch.float64)
RETURNS = torch.tensor([[1.0, 1.0, 1.0, 0.4]], dtype=torch.float64)
FULL = torch.ones(1, 4, dtype=torch.bool)
PLAIN = [0.81, 0.25, 2.25, 0.01]
CLIPPED = [0.81, 0.64, 2.25, 0.04]  # the second and the fourth are held at 0.2


@pytest.mark.parametrize(("clip", "squares"), [(None, PLAIN), (0.2, CLIPPED)])
def test_by_hand(clip: float | None, squares: list[float]) -> None:
    total, count = value_loss(VALUES, OLD, RETURNS, FULL, clip=clip)
    assert abs(float(total) - sum(squares) / 2) < 1e-12
    assert int(count) == 4


def test_values_held_by_the_clip_get_no_gradient() -> None:
    values = VALUES.clone().requires_grad_()
    value_loss(values, OLD, RETURNS, FULL)[0].backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([[-0.9, 0.0, -1.5, 0.0]], dtype=torch.float64))


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_masked_slots_have_no_influence(garbage: float) -> None:
    mask = torch.tensor([[True, True, False, False]])
    values, old, returns = (x.masked_fill(~mask, garbage).requires_grad_() for x in (VALUES, OLD, RETURNS))
    total, count = value_loss(values, old, returns, mask, reduction="seq_mean_token_mean")
    total.backward()
    assert values.grad is not None
    assert abs(float(total.detach()) - (0.81 + 0.64) / 4) < 1e-12
    assert int(count) == 1
    assert values.grad[~mask].eq(0).all()
    assert old.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 0.0}, r"clip: got 0\.0"),
        ({"old_values": OLD[0]}, r"old_values: got shape \(4,\)"),
        ({"returns": RETURNS[:, :3]}, r"returns: got shape \(1, 3\)"),
        ({"reduction": "dr_grpo"}, r"max_len: got None"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"values": VALUES, "old_values": OLD, "returns": RETURNS, "mask": FULL}
    with pytest.raises(ConfigError, match=message):
        value_loss(**{**arguments, **options})
