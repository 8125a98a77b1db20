"""What a person sees while a run goes on: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from effml_shared.loop import Hook, Loop

__all__ = ["ProgressBar"]


class ProgressBar(Hook):
    """Show the trial, its step, loss, tokens per second, and the time left for the whole run.

    Args:
        console: where to; without a terminal, a line at most every `interval` seconds.
        within: stands before the trial's name, such as the experiment of several that it belongs to.
    """

    def __init__(self, console: Console, *, interval: float = 10.0, within: str = "") -> None:
        self.console, self.interval, self.within = console, interval, within
        columns = (
            TextColumn("{task.description}"),
            BarColumn(24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        self._bars = Progress(*columns, console=console, transient=True) if console.is_terminal else None
        self._expected = self._done = self._worked = 0  # samples: of the whole run, behind us, seen in this session
        self._begun = 0.0  # with the first trial: what prepares it comes only once
        self._printed = time.monotonic()

    def expect(self, samples: int) -> None:
        """Say how many samples are still to come, over all trials."""
        self._expected = samples

    def on_start(self, loop: Loop) -> None:
        trial = next((hook.trial for hook in loop.hooks if hasattr(hook, "trial")), "training")
        self._trial = f"{self.within}{trial}"
        self._begun = self._begun or time.monotonic()
        self._first = self._last = loop.clock
        self._done += loop.clock.samples
        if self._bars is not None:
            total = loop.budget.samples or loop.budget.steps
            self._task = self._bars.add_task(self._trial, total=total, completed=self._position(loop), note="")
            self._bars.start()

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        now, clock = time.monotonic(), loop.clock
        self._done += clock.samples - self._last.samples
        self._worked += clock.samples - self._last.samples
        self._last = clock
        shown = [f"step {clock.step}"]
        shown += [f"loss {metrics['loss']:.3f}"] if "loss" in metrics else []
        if clock.tokens > self._first.tokens:
            speed = (clock.tokens - self._first.tokens) / max(clock.seconds - self._first.seconds, 1e-9)
            shown.append(f"{speed:,.0f} tok/s")
        if self._expected:
            left = max(self._expected - self._done, 0) * (now - self._begun) / self._worked
            shown.append(f"{int(left) // 60}:{int(left) % 60:02d} left")
        if self._bars is not None:
            self._bars.update(self._task, completed=self._position(loop), note="  ".join(shown))
        elif now - self._printed >= self.interval:
            self._printed = now
            self.console.print("  ".join([self._trial, *shown]), highlight=False, soft_wrap=True)

    def on_end(self, loop: Loop) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars.remove_task(self._task)

    @staticmethod
    def _position(loop: Loop) -> int:
        return loop.clock.samples if loop.budget.samples else loop.clock.step
