"""What the benchmarks of this folder share: contenders that take turns, JSON for machines, a table for people."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

__all__ = ["Contenders", "publish", "say", "timed"]

Contenders = dict[str, Callable[[], Any]]


def timed(contenders: Contenders, samples: int) -> dict[str, list[float]]:
    """Return milliseconds of every sample; contenders take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(samples + 1):
        for name, function in contenders.items():
            gc.collect()
            start = time.perf_counter()
            function()
            if turn:  # the first is the warm-up
                seconds[name].append((time.perf_counter() - start) * 1e3)
    return seconds


def say(text: str) -> None:
    """Print for people: stdout is for JSON."""
    print(text, file=sys.stderr, flush=True)


def publish(rows: Iterable[dict[str, Any]], keys: Sequence[str], *, as_table: bool) -> list[dict[str, Any]]:
    """Print each row as JSON when it comes, say which contenders differ, then the table; return the rows."""
    found = []
    for row in rows:
        found.append(row)
        print(json.dumps(row), flush=True)
        if not row.get("equal", True):
            say(f"{row['contender']} differs from ours: {row}")
    if as_table:
        table(found, keys)
    return found


def table(rows: list[dict[str, Any]], keys: Sequence[str]) -> None:
    """Print rows as an aligned table on stderr."""
    cells = [[str(row.get(key, "")) for key in keys] for row in rows]
    widths = [max(map(len, column)) for column in zip(keys, *cells, strict=True)]
    for line in (list(keys), *cells):
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
