"""What one step is to be: a schedule maps the clock to a `Plan`, and the loop obeys.

The clock that schedules read is *samples consumed*, never steps: a batch that grows in mid-run then moves no
learning rate. Every schedule is a function `Clock -> Plan`; the ordinary one is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from effml_shared.errors import ConfigError

__all__ = ["Clock", "Plan", "Schedule", "cosine"]


@dataclass(frozen=True)
class Clock:
    """How far a training run is: optimizer steps, samples, tokens and training seconds consumed."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Plan:
    """What the next step is to be.

    Attributes:
        batch_size: samples over all ranks.
        lr_factor: multiplies every parameter group's own learning rate.
        precision: `"float32"` or `"bfloat16"` for this step; None leaves the step's own setting.
    """

    batch_size: int
    lr_factor: float = 1.0
    precision: str | None = None


Schedule = Callable[[Clock], Plan]


def cosine(batch_size: int, total: int, *, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Warm up linearly, then decay by half a cosine to `floor` at `total` samples.

    >>> plan = cosine(8, total=800, warmup=80)
    >>> [round(plan(Clock(samples=n)).lr_factor, 3) for n in (0, 72, 440, 800)]
    [0.1, 1.0, 0.5, 0.0]
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: got {batch_size}, expected an integer >= 1")
    if not 0 <= warmup < total:
        raise ConfigError(f"warmup: got {warmup} of {total} samples, expected 0 <= warmup < total")
    if not 0 <= floor <= 1:
        raise ConfigError(f"floor: got {floor}, expected a fraction in [0, 1]")

    def plan(clock: Clock) -> Plan:
        if clock.samples < warmup:
            return Plan(batch_size, min(1.0, (clock.samples + batch_size) / warmup))
        progress = min(1.0, (clock.samples - warmup) / (total - warmup))
        return Plan(batch_size, floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))

    return plan
