from __future__ import annotations

import io

from effml_eval.evaluation.request_progress import RequestProgress
from rich.console import Console


def shown(patience: float, *, terminal: bool) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100)
    with RequestProgress(14, console, patience=patience, interval=0) as progress:
        progress.skip(4)
        progress.advance(4)
        progress.advance(2)
    return file.getvalue()


def test_lines_where_there_is_no_terminal() -> None:
    lines = shown(0, terminal=False).splitlines()
    assert lines == ["evaluating  4 of 10 requests  0:00 left", "evaluating  6 of 10 requests  0:00 left"]


def test_a_bar_on_a_terminal() -> None:
    assert "6/10" in shown(0, terminal=True)


def test_nothing_for_what_takes_a_moment() -> None:
    assert shown(60, terminal=True) == shown(60, terminal=False) == ""
    with RequestProgress(10, None, patience=0) as progress:
        progress.advance(10)
