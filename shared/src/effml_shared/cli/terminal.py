"""How the commands speak: tables on stdout, one line on stderr, the command that continues."""

from __future__ import annotations

import shlex
import signal
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from effml_shared import distributed
from effml_shared.errors import Interrupted

if TYPE_CHECKING:
    from effml_shared.loop import Hook

__all__ = ["continue_with", "print_table", "say", "watchers"]

_MARKS = {"holds": "green", "does not hold": "red", "inconclusive": "yellow", "failed": "magenta"}


def print_table(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print rows under the keys of the first one; verdicts are coloured, also as `1.2% (holds)`."""
    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for key in rows[0]:
        numeric = all(isinstance(row.get(key), int | float | None) for row in rows)
        table.add_column(
            key.replace("[", r"\["),
            justify="right" if numeric else "left",
            no_wrap=key == "verdict",
            overflow="fold",  # never cut: what is told apart by its end must be
        )
    for row in rows:
        table.add_row(*map(_cell, row.values()))
    console.print(table)
    console.print()


def _cell(value: Any) -> str:
    from effml_shared.report import number

    text = number(value)
    word = text.rpartition("(")[2].removesuffix(")") if text.endswith(")") else text
    text = text.replace("[", r"\[")
    return f"[{_MARKS[word]}]{text}[/]" if word in _MARKS else text


def say(line: str) -> None:
    """Print one line on stderr."""
    if distributed.is_main():
        print(" ".join(line.split()), file=sys.stderr)


def watchers(console: Console, within: str = "") -> list[Hook]:
    """Return the hooks that show a run while it goes on."""
    from effml_shared.progress import ProgressBar

    return [ProgressBar(console, within=within)] if distributed.is_main() else []


def continue_with(words: list[str], stop: Interrupted | KeyboardInterrupt) -> Interrupted:
    """Return the interruption that names the command that continues."""
    signum = stop.signum if isinstance(stop, Interrupted) else signal.SIGINT
    return Interrupted(f"interrupted; continue with: effml {shlex.join(words)}", signum)
