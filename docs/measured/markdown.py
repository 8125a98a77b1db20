"""Numbers, tables and paragraphs as the pages print them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from effml_shared.report import mean_with_interval

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


def plus_minus(mean: float | None, half_width: float | None, decimals: int) -> str:
    """Return a mean with half of its interval, which a single seed does not have.

    >>> plus_minus(2.3212, 0.0144, 3), plus_minus(2.3212, None, 3)
    ('2.321 ± 0.014', '2.321')
    """
    return fixed(mean, decimals) if half_width is None else f"{fixed(mean, decimals)} ± {fixed(half_width, decimals)}"


def span(values: Iterable[float], digits: int = 2) -> str:
    """Return the least and the largest of some values, or the one number that both print as.

    >>> span([1.89, 1.74, 1.9]), span([0.2])
    ('1.7 to 1.9', '0.20')
    """
    found = list(values)
    low, high = number(min(found), digits), number(max(found), digits)
    return low if low == high else f"{low} to {high}"


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
    """Return the claims of runs as a table: the paper's words and number, ours with interval and seeds, the verdict."""
    wanted = None if effects is None else set(effects)
    rows = []
    for verdict in (verdict for name in names for verdict in run(name)["claims"]):
        claim = verdict["claim"]
        if wanted is None or claim["effect"] in wanted:
            measured, low_high = measurement(verdict)
            seeds = str(verdict["seeds"] or "–")
            rows.append((claim["text"], claim["paper"], measured, low_high, seeds, verdict["verdict"]))
    return table(("claim", "the paper's own number", "measured here", "95% interval", "seeds", "verdict"), rows)


def measurement(verdict: dict[str, Any]) -> tuple[str, str]:
    """Return the mean with its unit, and the interval, to the decimals that reports print."""
    mean, interval = mean_with_interval(verdict)
    unit = verdict["claim"]["unit"]
    return ("not measured at this size" if verdict["mean"] is None else f"{mean}{unit}"), interval


def made(name: str) -> str:
    """Return a sentence on a run: its minutes, day and machine; nothing of one that was recorded without a manifest."""
    manifest = run(name).get("manifest")
    if manifest is None:
        return ""
    machine, versions = manifest["machine"], manifest["versions"]
    device, minutes = machine["gpu"] or machine["cpu"], number(run(name)["seconds"] / 60, 2)
    ran_with = settings({"threads": machine["threads"], "torch": versions["torch"]})
    return f"`{name}` took {minutes} minutes ({manifest['started'][:10]}, {device}, {ran_with})."


def settings(case: dict[str, Any], **peers: str) -> str:
    """Return the processor, threads and versions that something was measured with, as far as they were recorded.

    Args:
        case: a case of a benchmark with the settings of its run.
        peers: distributions that took part, by the names to print.

    >>> settings({"threads": 2, "torch": "2.15.0+cu132"})
    '2 threads, torch 2.15.0'
    >>> case = {"cpu": "AMD EPYC", "cpu_model": "family 26, model 2", "threads": 1, "versions": {"trl": "1.16.0"}}
    >>> settings(case, TRL="trl")
    'AMD EPYC (family 26, model 2), 1 thread, TRL 1.16.0'
    """
    found = []
    if "cpu" in case:
        found.append(f"{case['cpu']} ({case['cpu_model']})" if "cpu_model" in case else case["cpu"])
    if "threads" in case:
        found.append(f"{case['threads']} thread{'s' if case['threads'] > 1 else ''}")
    if "wait_policy" in case:
        found.append(f"`OMP_WAIT_POLICY={case['wait_policy']}`")
    versions = case.get("versions", {})
    named = {"torch": case.get("torch"), **{name: versions.get(peer) for name, peer in peers.items()}}
    found += [f"{name} {version.partition('+')[0]}" for name, version in named.items() if version]
    return ", ".join(found)
