"""Numbers, tables and paragraphs as the pages print them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from measured.results import run

WIDTH = 120


def number(value: float | None, digits: int = 3) -> str:
    """Return so many significant digits without an exponent, with commas; a dash where there is no number.

    >>> number(13884.2), number(0.25912), number(2.0), number(-0.0021, 1), number(1287.4, 2), number(None)
    ('13,900', '0.259', '2.00', '-0.002', '1,300', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return f"{round(value, decimals):,.{max(decimals, 0)}f}"


def fixed(value: float | None, decimals: int) -> str:
    """Return so many decimals, with commas; a dash where there is no number, and no minus before a zero."""
    if value is None or math.isnan(value):
        return "–"
    return f"{round(value, decimals) + 0.0:,.{decimals}f}"


def interval(verdict: dict[str, Any], decimals: int) -> str:
    """Return `[low, high]` of a stored verdict."""
    return f"[{fixed(verdict['low'], decimals)}, {fixed(verdict['high'], decimals)}]" if verdict["seeds"] > 1 else "–"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; what is no text yet is printed by `number`."""
    cells = [[cell if isinstance(cell, str) else number(cell) for cell in row] for row in rows]
    for row in cells:
        if len(row) != len(head):
            raise ValueError(f"got a row of {len(row)} cells, expected {len(head)}: {row}")
    rule = f"|{'---|' * len(head)}"
    return "\n".join([_row(head), rule, *map(_row, cells)])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def paragraph(text: str) -> str:
    """Return a text wrapped as the pages are, runs of white space as one space."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def claims(*names: str, effects: Iterable[str] | None = None) -> str:
    """Return the claims of runs as a table: the paper's words, its number, ours with its interval, the verdict."""
    wanted = None if effects is None else set(effects)
    rows = []
    for verdict in (verdict for name in names for verdict in run(name)["claims"]):
        claim = verdict["claim"]
        if wanted is None or claim["effect"] in wanted:
            measured, low_high = measurement(verdict)
            rows.append((claim["text"], claim["paper"], measured, low_high, verdict["verdict"]))
    return table(("claim", "the paper's own number", "measured here", "95% interval", "verdict"), rows)


def measurement(verdict: dict[str, Any]) -> tuple[str, str]:
    """Return the mean with its unit, and the interval, to as many decimals as two digits of its half width need."""
    if verdict["mean"] is None:
        return "not measured at this size", "–"
    half = (verdict["high"] - verdict["low"]) / 2 if verdict["seeds"] > 1 else 0.0
    scale = half or abs(verdict["mean"]) / 10 or 1.0
    decimals = max(0, 1 - math.floor(math.log10(scale)))
    return f"{fixed(verdict['mean'], decimals)}{verdict['claim']['unit']}", interval(verdict, decimals)
