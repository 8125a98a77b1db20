"""The one training loop: clock, plan, data, step, hooks, evaluation, checkpoints, signals, exact resume.

It knows nothing of losses, optimizers or schedules. Per step: ask the schedule for a `Plan`, the data for that many
samples, the step for an update; tell the hooks. What a resumed run depends on (step, data position, clock, random
state, hooks that have a `state_dict`) is in every checkpoint, so a run killed anywhere continues on the same path,
bit by bit on a CPU. Overhead per step is microseconds; several ranks add one small all-reduce.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from effml_shared import distributed, seeding
from effml_shared.checkpoint import Checkpoint, Checkpoints
from effml_shared.errors import ConfigError, Interrupted, NonFiniteError
from effml_shared.schedules import Clock, Schedule
from effml_shared.steps import Step

__all__ = ["Budget", "Data", "Hook", "Loop"]


class Data(Protocol):
    """Where batches come from; its position is part of every checkpoint."""

    def next(self, batch_size: int) -> Any:
        """Return this rank's share of the next `batch_size` samples."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""


class Hook:
    """Something that watches or intervenes: a probe, a progress bar, a precision switch. Override what is needed.

    A hook with state of its own also defines `state_dict` and `load_state_dict`; they travel in the checkpoint.
    """

    def on_start(self, loop: Loop) -> None:
        """Run begins, or goes on from a checkpoint (then `loop.clock` says where)."""

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        """A step is done; `loop.clock` counts it already."""

    def on_evaluate(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        """An evaluation is done."""

    def on_end(self, loop: Loop) -> None:
        """The loop is left, for whatever reason."""


@dataclass(frozen=True)
class Budget:
    """When to stop: at whichever of these limits is met first. None: no such limit."""

    steps: int | None = None
    samples: int | None = None
    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        limits = {name: limit for name, limit in asdict(self).items() if limit is not None}
        if not limits:
            raise ConfigError("budget: got no limit, expected steps, samples, tokens or seconds")
        for name, limit in limits.items():
            if not limit > 0:
                raise ConfigError(f"budget.{name}: got {limit}, expected a number > 0")

    def spent(self, clock: Clock) -> bool:
        """Say whether a limit is met."""
        used = {"steps": clock.step, "samples": clock.samples, "tokens": clock.tokens, "seconds": clock.seconds}
        return any(limit is not None and used[name] >= limit for name, limit in asdict(self).items())


class Loop:
    """Train until the budget is spent.

    Args:
        step: what one update is.
        data: where its batches come from.
        schedule: the plan of each step. The last step is cut to what is left of a sample budget.
        budget: when to stop.
        hooks: called in this order.
        evaluate: returns metrics; called every `evaluate_every` samples and at the end.
        evaluate_every: None: only at the end.
        checkpoints: where to save. None: nothing is saved.
        save_every: seconds of training between saves; a signal and the end of the run always save.
        seed: of the global generators, mixed with the rank.

    Attributes:
        clock: how far the run is.
        evaluation: metrics of the latest evaluation.
    """

    def __init__(
        self,
        step: Step,
        data: Data,
        schedule: Schedule,
        *,
        budget: Budget,
        hooks: Sequence[Hook] = (),
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        evaluate_every: int | None = None,
        checkpoints: Checkpoints | None = None,
        save_every: float = 60.0,
        seed: int = 0,
    ) -> None:
        if evaluate_every is not None and evaluate_every < 1:
            raise ConfigError(f"evaluate_every: got {evaluate_every}, expected a number of samples >= 1")
        self.step, self.data, self.schedule, self.budget = step, data, schedule, budget
        self.hooks, self.evaluate, self.evaluate_every = list(hooks), evaluate, evaluate_every
        self.checkpoints, self.save_every, self.seed = checkpoints, save_every, seed
        self.clock = Clock()
        self.evaluation: dict[str, float] = {}
        self._last_saved: Path | None = None
        self._saved_step = -1
        self._signal = 0

    def run(self) -> Clock:
        """Run, or go on from the newest checkpoint, to the end of the budget.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the run is saved.
            NonFiniteError: the step met NaN or infinity; the message names the last good checkpoint.
        """
        seeding.seed_all(seeding.derive_seed(self.seed, "loop", distributed.rank()))
        found = self.checkpoints.load() if self.checkpoints is not None else None
        if found is not None:
            self._restore(found)
        with _caught_signals(self._on_signal):
            for hook in self.hooks:
                hook.on_start(self)
            try:
                self._train()
            finally:
                for hook in self.hooks:
                    hook.on_end(self)
        return self.clock

    def _train(self) -> None:
        saved_at = self.clock.seconds
        while not self.budget.spent(self.clock):
            before = self.clock
            self._advance()
            if (
                self.evaluate_every
                and before.samples // self.evaluate_every != self.clock.samples // self.evaluate_every
            ):
                self._evaluate()
            if self.checkpoints is not None:
                due, stop = distributed.reduce_max(self.clock.seconds - saved_at >= self.save_every, self._signal)
                if due or stop:
                    self.save()
                    saved_at = self.clock.seconds
            else:
                (stop,) = distributed.reduce_max(self._signal)
            if stop:
                where = (
                    f"saved at {self._last_saved}"
                    if self._last_saved
                    else "nothing is saved: no checkpoints were asked for"
                )
                raise Interrupted(
                    f"stopped by {signal.Signals(int(stop)).name} after step {self.clock.step}; {where}", int(stop)
                )
        if self.evaluate is not None and self.evaluation.get("step") != self.clock.step:
            self._evaluate()
        if self.checkpoints is not None and self._saved_step != self.clock.step:
            self.save()

    def _advance(self) -> None:
        plan = self.schedule(self.clock)
        if self.budget.samples is not None:
            plan = replace(plan, batch_size=min(plan.batch_size, self.budget.samples - self.clock.samples))
        start = time.perf_counter()
        batch = self.data.next(plan.batch_size)
        try:
            metrics = self.step(batch, plan)
        except NonFiniteError as error:
            last = f"last good checkpoint: {self._last_saved}" if self._last_saved else "no checkpoint was saved yet"
            raise NonFiniteError(f"step {self.clock.step + 1}: {error}; {last}") from None
        (seconds,) = distributed.reduce_max(time.perf_counter() - start)  # one clock, so that all ranks stop together
        self.clock = Clock(
            self.clock.step + 1,
            self.clock.samples + plan.batch_size,
            self.clock.tokens + int(metrics.get("tokens", 0)),
            self.clock.seconds + seconds,
        )
        for hook in self.hooks:
            hook.on_step(self, metrics)

    def _evaluate(self) -> None:
        if self.evaluate is not None:
            metrics = self.evaluate()
            self.evaluation = {**metrics, "step": self.clock.step}
            for hook in self.hooks:
                hook.on_evaluate(self, metrics)

    def save(self) -> None:
        """Write a checkpoint now."""
        if self.checkpoints is None:
            raise ConfigError("save: got a loop without checkpoints, expected Loop(..., checkpoints=Checkpoints(...))")
        hooks = [hook.state_dict() if hasattr(hook, "state_dict") else None for hook in self.hooks]
        state = {"clock": asdict(self.clock), "step": self.step.state_dict(), "data": self.data.state_dict()}
        self._last_saved = self.checkpoints.save(
            self.clock.step, {**state, "hooks": hooks, "evaluation": self.evaluation}, {"random": seeding.capture()}
        )
        self._saved_step = self.clock.step

    def _restore(self, found: Checkpoint) -> None:
        state = found.state
        self.step.load_state_dict(state["step"])
        self.data.load_state_dict(state["data"])
        for hook, stored in zip(self.hooks, state["hooks"], strict=False):
            if stored is not None and hasattr(hook, "load_state_dict"):
                hook.load_state_dict(stored)
        self.clock, self.evaluation = Clock(**state["clock"]), state["evaluation"]
        self._last_saved, self._saved_step = found.path, found.step
        if found.rank_state is not None:
            seeding.restore(found.rank_state["random"])
        else:  # another world size: there is no state to continue, so start streams that no rank has used
            seeding.seed_all(seeding.derive_seed(self.seed, "loop", distributed.rank(), found.step))

    def _on_signal(self, signum: int) -> None:
        self._signal = signum


@contextmanager
def _caught_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """Let the first SIGINT or SIGTERM finish the step; the second one acts as it always did."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def caught(signum: int, frame: Any) -> None:
        handle(signum)
        signal.signal(signum, previous[signal.Signals(signum)])

    for number in previous:
        signal.signal(number, caught)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
