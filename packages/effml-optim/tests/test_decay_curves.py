"""Curves against their definitions, and torch schedulers read without being touched."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from effml_optim.seesaw.decay_curves import (
    half_cosine,
    polygon,
    quarter_cosine,
    scheduler_curve,
    stable_then_line,
    staircase,
)
from effml_shared.errors import ConfigError
from torch.optim import lr_scheduler as schedulers

CURVES = {
    "half": partial(half_cosine, 0.0),
    "half to 0.2": partial(half_cosine, 0.2),
    "quarter": partial(quarter_cosine, 0.1),
    "line": partial(stable_then_line, 1.0, 0.0),
    "wsd": partial(stable_then_line, 0.3, 0.05),
    "stairs": partial(staircase, (0.25, 0.5), (1.0, 0.5, 0.1)),
    "polygon": partial(polygon, (1.0, 0.9, 0.3, 0.3)),
}


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_curves_start_at_1_never_rise_and_can_be_pickled(curve: Any) -> None:
    values = [curve(i / 999) for i in range(1000)]
    assert values[0] == 1
    assert all(0 <= after <= before for before, after in pairwise(values))
    assert pickle.loads(pickle.dumps(curve))(0.5) == curve(0.5)


def test_curves_are_what_they_are_called() -> None:
    for u in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert half_cosine(0.1, u) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * u)) / 2, abs=1e-15)
        assert quarter_cosine(0.1, u) == pytest.approx(0.1 + 0.9 * math.cos(math.pi * u / 2), abs=1e-15)
        assert stable_then_line(0.4, 0.2, u) == pytest.approx(1 - 0.8 * max(0, (u - 0.6) / 0.4), abs=1e-15)
    assert [staircase((0.5,), (1.0, 0.1), u) for u in (0.0, 0.499, 0.5, 1.0)] == [1.0, 1.0, 0.1, 0.1]
    assert half_cosine(0.0, 1 - 1e-12) == pytest.approx((math.pi / 2 * 1e-12) ** 2, rel=1e-3)  # not 0


def make_optimizer(**options: Any) -> torch.optim.Optimizer:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [weights[0]]}, {"params": [weights[1]], "lr": 0.2}]
    return torch.optim.AdamW(groups, **{"lr": 0.1, **options})


def warm_cosine(optimizer: torch.optim.Optimizer) -> schedulers.LRScheduler:
    warm = schedulers.LinearLR(optimizer, start_factor=0.1, total_iters=4)
    cosine = schedulers.CosineAnnealingLR(optimizer, T_max=16)
    return schedulers.SequentialLR(optimizer, [warm, cosine], milestones=[4])


def hugging_face_cosine(optimizer: torch.optim.Optimizer) -> schedulers.LRScheduler:
    """What `transformers.get_cosine_schedule_with_warmup(optimizer, 4, 20)` returns."""

    def factor(step: int) -> float:
        if step < 4:
            return step / 4
        return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - 4) / 16)))

    return schedulers.LambdaLR(optimizer, factor)


SCHEDULERS = {
    "linear": lambda optimizer: schedulers.LinearLR(optimizer, 1.0, 0.1, total_iters=20),
    "warm-up only": lambda optimizer: schedulers.LinearLR(optimizer, 0.1, 1.0, total_iters=5),
    "cosine": lambda optimizer: schedulers.CosineAnnealingLR(optimizer, T_max=20),
    "step": lambda optimizer: schedulers.StepLR(optimizer, step_size=7, gamma=0.1),
    "lambda": lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 0.9**step),
    "sequential": warm_cosine,
    "hugging face": hugging_face_cosine,
    "chained": lambda optimizer: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(optimizer, 1.0), schedulers.ExponentialLR(optimizer, 0.9)]
    ),
}


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)], ids=["float", "tensor"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_is_read_as_it_runs_and_left_alone(make: Any, lr: Any) -> None:
    optimizer = make_optimizer(lr=copy.deepcopy(lr))
    scheduler = make(optimizer)
    before = copy.deepcopy([optimizer.state_dict(), scheduler.state_dict()])
    rise, fall = scheduler_curve(scheduler, 20)
    assert repr([optimizer.state_dict(), scheduler.state_dict()]) == repr(before)
    expected = []
    for _ in range(20):
        expected.append(float(optimizer.param_groups[0]["lr"]) / 0.1)
        optimizer.step()
        scheduler.step()
    expected.append(float(optimizer.param_groups[0]["lr"]) / 0.1)
    tolerance = 1e-12 if isinstance(lr, float) else 1e-6
    assert [*rise, *fall[1:]] == pytest.approx(expected, abs=tolerance)
    assert rise[-1] == fall[0] == 1


def test_the_twin_is_found_inside_callables_and_transformers_schedules() -> None:
    transformers = pytest.importorskip("transformers")
    scheduler = transformers.get_cosine_schedule_with_warmup(make_optimizer(), 4, 20)
    expected = scheduler_curve(hugging_face_cosine(make_optimizer()), 20)
    for ours, theirs in zip(scheduler_curve(scheduler, 20), expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-12)


def half_and_whole(optimizer: torch.optim.Optimizer) -> schedulers.LRScheduler:
    return schedulers.LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 0.8**step])


def stepped(optimizer: torch.optim.Optimizer) -> schedulers.LRScheduler:
    scheduler = schedulers.StepLR(optimizer, 3)
    optimizer.step()
    scheduler.step()
    return scheduler


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (schedulers.ReduceLROnPlateau, "scheduler: got ReduceLROnPlateau, expected one that depends on steps alone"),
        (stepped, "scheduler: got one at step 1, expected a new one"),
        (half_and_whole, "scheduler: got param groups at 0.9 and 0.8 of their initial_lr at step 1, expected one"),
        (
            lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: 0.5 * 0.9**step),
            "scheduler: got a peak of 0.5 times initial_lr, expected 1: set the optimizer's lr to it",
        ),
        (
            lambda optimizer: schedulers.CosineAnnealingWarmRestarts(optimizer, 10),
            "scheduler: got one that rises after its peak, at step 10, expected a warm-up and a decay",
        ),
        (
            lambda optimizer: schedulers.LambdaLR(optimizer, lambda step: (0.5, 0.4, 1.0)[min(step, 2)]),
            "scheduler: got one that falls before its peak, at step 1, expected a warm-up and a decay",
        ),
    ],
)
def test_a_scheduler_that_is_no_warm_up_and_decay_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        scheduler_curve(make(make_optimizer()), 20)
    assert str(error.value).startswith(message)
