"""The learning-rate decays that a `SeesawPlan` rewrites, as functions of the fraction u in [0, 1] of the decay.

Each starts at 1, never rises and may reach 0 at u = 1 only. They are plain functions of numbers, so `functools.partial`
of them can be pickled. `scheduler_curve` reads such a curve, and the warm-up before it, off any torch scheduler. No
state; a torch scheduler costs one of its steps per training step, on an optimizer without parameters.
"""

from __future__ import annotations

import copy
import math
import warnings
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import torch
from effml_shared.errors import ConfigError
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = ["half_cosine", "polygon", "quarter_cosine", "scheduler_curve", "stable_then_line", "staircase"]

_ROUNDING = 1e-6  # what a scheduler's own arithmetic may add; learning rates that are tensors are float32


def half_cosine(floor: float, u: float) -> float:
    """Return (1 + cos(pi u)) / 2, squeezed to end at `floor`: what most libraries call cosine."""
    return floor + (1 - floor) * math.cos(math.pi / 2 * u) ** 2  # as written above, it is 0 long before u = 1


def quarter_cosine(floor: float, u: float) -> float:
    """Return cos(pi u / 2), squeezed to end at `floor`."""
    return floor + (1 - floor) * math.cos(math.pi / 2 * u)


def stable_then_line(decay: float, floor: float, u: float) -> float:
    """Return 1, then over the last fraction `decay` a straight line to `floor`."""
    return max(floor, 1 - (1 - floor) * max(0.0, u - (1 - decay)) / decay)


def staircase(places: Sequence[float], heights: Sequence[float], u: float) -> float:
    """Return heights[i], i the number of `places` at or before u; there is one height more than places."""
    return heights[bisect_right(places, u)]


def polygon(values: Sequence[float], u: float) -> float:
    """Return `values`, spread evenly over [0, 1], joined by straight lines.

    >>> polygon([1.0, 0.5, 0.25], 0.25)
    0.75
    """
    place = u * (len(values) - 1)
    left = min(int(place), len(values) - 2)
    return values[left] + (place - left) * (values[left + 1] - values[left])


def scheduler_curve(scheduler: LRScheduler, steps: int) -> tuple[list[float], list[float]]:
    """Return the rise and the fall of a scheduler over `steps` steps: factors at whole steps, the peak (1) in both.

    A twin on a stand-in optimizer is driven: neither `scheduler` nor its optimizer changes.

    Raises:
        ConfigError: the scheduler has been stepped, needs a metric, treats param groups differently, peaks elsewhere
            than at the optimizer's own learning rate, falls before its peak or rises after it.
    """
    factors = _drive(scheduler, steps)
    top = max(factors)
    if not abs(top - 1) <= _ROUNDING:
        raise ConfigError(
            f"scheduler: got a peak of {top:.6g} times initial_lr, expected 1: set the optimizer's lr to it"
        )
    peak = next(step for step, factor in enumerate(factors) if factor >= top * (1 - _ROUNDING))
    rise, fall = (
        [min(1.0, factor / factors[peak]) for factor in part] for part in (factors[: peak + 1], factors[peak:])
    )
    for part, start, monotone, what in ((rise, 0, max, "falls before"), (fall, peak, min, "rises after")):
        for step, (value, expected) in enumerate(zip(part, accumulate(part, monotone), strict=True), start):
            if abs(value - expected) > _ROUNDING:
                got = f"one that {what} its peak, at step {step}"
                raise ConfigError(
                    f"scheduler: got {got}, expected a warm-up and a decay (restarts: one plan per cycle)"
                )
    return rise, list(accumulate(fall, min))


def _drive(scheduler: LRScheduler, steps: int) -> list[float]:
    """Return learning rate over `initial_lr` before each step and after the last."""
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ConfigError("scheduler: got ReduceLROnPlateau, expected one that depends on steps alone")
    if getattr(scheduler, "last_epoch", 0) != 0:
        raise ConfigError(f"scheduler: got one at step {scheduler.last_epoch}, expected a new one")
    stand_in = torch.optim.SGD([torch.zeros(())])
    stand_in.param_groups = [
        {name: [] if name == "params" else copy.deepcopy(value) for name, value in group.items()}
        for group in scheduler.optimizer.param_groups
    ]
    twin = copy.deepcopy(scheduler, {id(scheduler.optimizer): stand_in})  # the memo swaps the optimizer wherever it is
    groups = [group for group in stand_in.param_groups if float(group["initial_lr"]) != 0] or stand_in.param_groups[:1]
    factors: list[float] = []
    with warnings.catch_warnings():  # torch warns that nobody steps the stand-in
        warnings.simplefilter("ignore")
        for step in range(steps + 1):
            first, *others = (float(group["lr"]) / (float(group["initial_lr"]) or 1.0) for group in groups)
            if any(abs(other - first) > _ROUNDING for other in others):
                got = f"param groups at {first:.6g} and {others[0]:.6g} of their initial_lr at step {step}"
                raise ConfigError(f"scheduler: got {got}, expected one factor for all")
            factors.append(first)
            if step < steps:
                twin.step()
    return factors
