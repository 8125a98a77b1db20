"""How far an evaluation is: a bar on a terminal, a plain line now and then elsewhere, nothing if it takes a moment."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["RequestProgress"]


class RequestProgress:
    """Count answered requests, as a context.

    Args:
        total: requests to come.
        console: where to show it; None: nowhere.
        patience: seconds until anything is shown.
        interval: seconds between lines where there is no terminal.
    """

    def __init__(self, total: int, console: Console | None, *, patience: float = 2.0, interval: float = 10.0) -> None:
        self.total, self.console, self.patience, self.interval = total, console, patience, interval
        self.done = 0
        self._begun = self._printed = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> RequestProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def skip(self, requests: int) -> None:
        """Say that so many were answered before: they are no part of the work."""
        self.total -= requests

    def advance(self, requests: int) -> None:
        """Say that so many more are answered."""
        self.done += requests
        now = time.monotonic()
        if self.console is None or now - self._begun < self.patience:
            return
        if self.console.is_terminal:
            if self._bar is None:
                columns = TextColumn("evaluating"), BarColumn(24), MofNCompleteColumn(), TimeRemainingColumn()
                self._bar = Progress(*columns, console=self.console, transient=True)
                self._bar.add_task("", total=self.total)
                self._bar.start()
            self._bar.update(self._bar.task_ids[0], completed=self.done, total=self.total)
        elif now - self._printed >= self.interval:
            self._printed = now
            left = (now - self._begun) * (self.total - self.done) / max(self.done, 1)
            shown = f"evaluating  {self.done} of {self.total} requests  {int(left) // 60}:{int(left) % 60:02d} left"
            self.console.print(shown, highlight=False, soft_wrap=True)
