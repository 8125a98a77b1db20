"""Raw measurements: summaries of runs (NAME.PRESET.json) and lines of benchmarks (bench_NAME.cpu.jsonl)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


@cache
def run(name: str, preset: str = "cpu") -> dict[str, Any]:
    """Return the summary of an experiment's run, with its manifest if it was recorded with one."""
    return json.loads((RESULTS / f"{name}.{preset}.json").read_text())


def claim(name: str, effect: str) -> dict[str, Any]:
    """Return one verdict of a run: `mean`, `low`, `high`, `seeds`, `verdict` and its `claim`."""
    verdicts = {verdict["claim"]["effect"]: verdict for verdict in run(name)["claims"]}
    if effect not in verdicts:
        raise KeyError(f"{name} judged no {effect!r}, only {', '.join(verdicts)}")
    return verdicts[effect]


@cache
def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / f"{name}.cpu.jsonl").read_text().splitlines() if line.strip()]


def lines(name: str, **where: Any) -> list[dict[str, Any]]:
    """Return the lines of a benchmark whose fields have the given values."""
    return [line for line in _lines(name) if all(line.get(key) == value for key, value in where.items())]


def cases(name: str, **where: Any) -> list[dict[str, Any]]:
    """Return the cases of a benchmark whose fields have the given values, each with the settings of its run.

    Settings (machine, versions, threads, sizes) stand in a line before the cases of a run, which names `torch`.
    """
    found, settings = [], {}
    for entry in _lines(name):
        if "torch" in entry:
            settings = entry
        elif all(entry.get(key) == value for key, value in where.items()):
            found.append({**settings, **entry})
    return found


def line(name: str, **where: Any) -> dict[str, Any]:
    """Return the one line of a benchmark whose fields have the given values."""
    found = lines(name, **where)
    if len(found) != 1:
        raise LookupError(f"{name}: {len(found)} lines where {where}, expected one")
    return found[0]
