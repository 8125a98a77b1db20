"""An automatic switch: a scheme gives way to a safer one when a reading stays beyond a threshold, and comes back.

Each watched metric has two thresholds: above `trip` for `patience` readings in a row the guard switches; only when
every metric has been at or below its `release` for `calm` readings does it switch back. Between both nothing happens,
so a reading that hovers does not make the scheme flap. What was switched when and why is logged and kept.
State: two counts per metric and the list of events. Cost: none beside the meters'. Goes beyond arXiv 2506.20752, whose
switches are made by hand; the default thresholds are ours, from rho < 1 (descent is certain) and from gains that clamp
in whole blocks or not at all. Not compared with other controllers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.loop import Hook, Loop

from effml_quant.precision.scheme import PrecisionScheme

if TYPE_CHECKING:
    from effml_quant.precision.application import ModelHandle

__all__ = ["DEFAULT_THRESHOLDS", "PrecisionGuard", "Threshold"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Threshold:
    """Above `trip` is too much; at or below `release` is good again. A reading that is not finite is too much."""

    trip: float
    release: float

    def __post_init__(self) -> None:
        if not self.release <= self.trip:
            raise ConfigError(f"release: got {self.release}, expected at most trip={self.trip}")


DEFAULT_THRESHOLDS: Mapping[str, Threshold] = MappingProxyType(
    {
        "bias/rho": Threshold(trip=1.0, release=0.5),  # of GradientBiasMeter
        "clamp/gains": Threshold(trip=0.25, release=0.05),  # of ClampMeter
        "grad_norm_growth": Threshold(trip=1.5, release=1.1),  # of SpikeDetector
    }
)


@dataclass(frozen=True)
class _Event:
    step: int
    safe: bool
    reason: str


class PrecisionGuard(Hook):
    """Switch a model between its scheme and a safer one.

    In the `Loop`, place it behind the meters that make its metrics. Elsewhere call `update(step, metrics)`.

    Args:
        handle: of the model.
        safe: scheme to switch to; None: no quantising.
        thresholds: by metric. Metrics that a step lacks are passed over.
        patience: readings in a row of one metric above its `trip` before the switch.
        calm: readings in a row of every metric at or below its `release` before the switch back. None: never.

    Attributes:
        is_safe: whether the model now has the safe scheme.
        events: every switch: step, whether to the safe scheme, reason.
    """

    def __init__(
        self,
        handle: ModelHandle,
        safe: PrecisionScheme | None = None,
        *,
        thresholds: Mapping[str, Threshold] = DEFAULT_THRESHOLDS,
        patience: int = 1,
        calm: int | None = 5,
    ) -> None:
        check_count("patience", patience, 1)
        if calm is not None:
            check_count("calm", calm, 1)
        if not thresholds:
            raise ConfigError("thresholds: got none, expected at least one metric")
        if safe is not None:
            handle.check(safe)
        self.handle, self.safe, self.thresholds = handle, safe, dict(thresholds)
        self.patience, self.calm = patience, calm
        self.usual = handle.scheme
        self.is_safe = False
        self.events: list[_Event] = []
        self._reset()

    def _reset(self) -> None:
        self._above, self._below = dict.fromkeys(self.thresholds, 0), dict.fromkeys(self.thresholds, 0)
        self._seen: set[str] = set()

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take in the readings of a step; say whether the scheme was switched."""
        for name, threshold in self.thresholds.items():
            if name in metrics:
                value = metrics[name]
                self._seen.add(name)
                self._above[name] = self._above[name] + 1 if not value <= threshold.trip else 0
                self._below[name] = self._below[name] + 1 if value <= threshold.release else 0
        if not self.is_safe:
            tripped = [name for name, count in self._above.items() if count >= self.patience]
            reason = ", ".join(f"{n} = {metrics.get(n, math.nan):.3g} > {self.thresholds[n].trip:g}" for n in tripped)
            return bool(tripped) and self._switch(step, True, reason)
        calm = self.calm is not None and self._seen and all(self._below[name] >= self.calm for name in self._seen)
        return bool(calm) and self._switch(
            step, False, f"{', '.join(sorted(self._seen))} calm for {self.calm} readings"
        )

    def _switch(self, step: int, safe: bool, reason: str) -> bool:
        self.is_safe = safe
        self.handle.set(self.safe if safe else self.usual)
        self.events.append(_Event(step, safe, reason))
        _log.warning("step %d: to the %s scheme: %s", step, "safe" if safe else "usual", reason)
        self._reset()
        return True

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        """Take in the step's metrics."""
        self.update(loop.clock.step, metrics)

    def state_dict(self) -> dict[str, Any]:
        """Return counts and events."""
        events = [{"step": e.step, "safe": e.safe, "reason": e.reason} for e in self.events]
        seen = sorted(self._seen)
        return {"safe": self.is_safe, "above": self._above, "below": self._below, "seen": seen, "events": events}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, and the scheme that goes with it."""
        self.is_safe, self._seen = state["safe"], set(state["seen"])
        self._above, self._below = dict(state["above"]), dict(state["below"])
        self.events = [_Event(**event) for event in state["events"]]
        self.handle.set(self.safe if self.is_safe else self.usual)
