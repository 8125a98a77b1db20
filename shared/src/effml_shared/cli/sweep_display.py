"""What a person sees while a sweep goes on: how many points are done, and how far those are that run.

On a terminal a block that is drawn anew; elsewhere a line whenever a point begins or ends, and now and then between.
All of it is read from the points' run directories.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from effml_shared.sweeps.directory import Sweep

__all__ = ["SweepDisplay", "position"]

_TAIL = 8192  # bytes that hold a file's last line


class SweepDisplay:
    """Show a sweep; a context manager.

    Args:
        sweep: what is shown.
        console: where to; without a terminal, a line per running point at most every `interval` seconds.
    """

    def __init__(self, sweep: Sweep, console: Console, *, interval: float = 30.0) -> None:
        self.sweep, self.console, self.interval = sweep, console, interval
        self._live = Live(console=console, transient=True) if console.is_terminal else None
        self._statuses = {point.name: sweep.status(point.name) for point in sweep.points}
        self._seen: dict[str, str] = {}
        self._printed: dict[str, float] = {}

    def __enter__(self) -> SweepDisplay:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, alive: Mapping[str, str], waiting: Sequence[str]) -> None:
        """Show the present state.

        Args:
            alive: `"running"` or `"queued"` by point.
            waiting: points that have not been started.
        """
        for name in self._seen.keys() - alive.keys():
            self._statuses[name] = self.sweep.outcome(name)
            self._line(name, self._statuses[name])
        running = [name for name, state in alive.items() if state == "running"]
        for name in running:
            if self._seen.get(name) != "running":
                self._line(name, "started")
                self._printed[name] = time.monotonic()
        self._seen = dict(alive)
        if self._live is not None:
            self._live.update(self._block(alive, running, waiting))
            return
        for name in running:
            if time.monotonic() - self._printed[name] >= self.interval:
                self._printed[name] = time.monotonic()
                self._line(name, position(self.sweep.directory(name)))

    def _line(self, name: str, words: str) -> None:
        self.console.print(f"{name}: {words}", highlight=False, markup=False, soft_wrap=True)

    def _block(self, alive: Mapping[str, str], running: Sequence[str], waiting: Sequence[str]) -> Group:
        over = Counter(status for name, status in self._statuses.items() if name not in alive and name not in waiting)
        counts = {"finished": over["finished"], "failed": over["failed"], "running": len(running)}
        counts |= {"queued": len(alive) - len(running), "to come": len(waiting)}
        words = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
        table = Table.grid(padding=(0, 2))
        for name in running[: max(self.console.height - 4, 1)]:
            table.add_row(Text(name), Text(position(self.sweep.directory(name))))
        return Group(Text(f"{len(self._statuses)} points: {words}"), table)


def position(run: Path) -> str:
    """Say how far a run is, from the last step that it has recorded."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - _TAIL, 0))
            rows = file.read().split(b"\n")[:-1]  # after the last: being written
        step: dict[str, Any] = json.loads(rows[-1])
        trial, count, loss = str(step["trial"]), int(step["step"]), step.get("loss")
    except (OSError, IndexError, ValueError, TypeError, KeyError):
        return "begins"
    return "  ".join([trial, f"step {count}", *([f"loss {loss:.3f}"] if isinstance(loss, float) else [])])
