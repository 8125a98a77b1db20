"""Change the precision scheme at given steps of a run, weights and optimizer state kept: a hook of the loop.

State: the scheme in force, so that a resumed run has it again, whoever set it. Cost: a comparison per step.
Source: the interventions of arXiv 2506.20752.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effml_shared.errors import ConfigError
from effml_shared.loop import Hook, Loop

from effml_quant.precision.application import ModelHandle
from effml_quant.precision.scheme import PrecisionScheme

__all__ = ["PrecisionSwitch"]


class PrecisionSwitch(Hook):
    """Switch schemes during a run of the `Loop`.

    Args:
        handle: of the model, from `apply_scheme`.
        schedule: from how many steps done on which scheme holds; None: the model as it was.

    Raises:
        ConfigError: a step is no integer >= 0, a value no scheme, or one that the model cannot have.
    """

    def __init__(self, handle: ModelHandle, schedule: Mapping[int, PrecisionScheme | None]) -> None:
        for step, scheme in schedule.items():
            if not isinstance(step, int) or isinstance(step, bool) or step < 0:
                raise ConfigError(f"schedule: got step {step!r}, expected an integer >= 0")
            if scheme is not None and not isinstance(scheme, PrecisionScheme):
                raise ConfigError(f"schedule: got {scheme!r} at step {step}, expected a PrecisionScheme or None")
            if scheme is not None:
                handle.check(scheme)
        self.handle, self.schedule = handle, dict(schedule)
        self._resumed = False

    def on_start(self, loop: Loop) -> None:
        """Set the scheme of the step that the run begins with, or goes on from."""
        last = max(self.schedule, default=0)
        if loop.budget.steps is not None and last >= loop.budget.steps:
            raise ConfigError(f"schedule: got step {last}, expected one before the run ends, at {loop.budget.steps}")
        due = [step for step in self.schedule if step <= loop.clock.step]
        if due and (not self._resumed or max(due) == loop.clock.step):
            self.handle.set(self.schedule[max(due)])

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        """Set the scheme that holds from the next step on."""
        if loop.clock.step in self.schedule:
            self.handle.set(self.schedule[loop.clock.step])

    def state_dict(self) -> dict[str, Any]:
        """Return the scheme in force."""
        scheme = self.handle.scheme
        return {"scheme": None if scheme is None else scheme.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back the scheme that was in force."""
        self.handle.set(None if state["scheme"] is None else PrecisionScheme.from_dict(state["scheme"]))
        self._resumed = True
