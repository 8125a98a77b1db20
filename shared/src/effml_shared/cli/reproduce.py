"""`effml reproduce`: many experiments one after the other, and one page of what they found."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from effml_shared import distributed
from effml_shared.cli.terminal import continue_with, print_table, watchers
from effml_shared.errors import Interrupted

__all__ = ["reproduce"]


def reproduce(options: argparse.Namespace, console: Console) -> int:
    """Carry out `effml reproduce`."""
    from effml_shared.reproduction import Reproduction
    from effml_shared.reproduction_page import duration, tally

    out = Path(options.out or Path("runs") / f"reproduction-{options.preset}")
    reproduction = Reproduction(out, options.preset, options.names)
    say = console.print if distributed.is_main() else lambda *words, **how: None
    total, todo = len(reproduction.asked), reproduction.unfinished()
    say(
        f"{total} experiment{'s' * (total != 1)}, {total - len(todo)} finished before; page: {out / 'index.html'}",
        highlight=False,
        markup=False,
    )
    try:
        for place, name in enumerate(todo):
            count = f"{total - len(todo) + place + 1}/{total}"
            times = {
                "about {}": reproduction.expected(name),
                "all in about {}": reproduction.seconds_left(todo[place:]),
            }
            words = [text.format(duration(seconds)) for text, seconds in times.items() if seconds]
            say(", ".join([f"[bold]{count} {name}[/]", *words]), highlight=False)
            reproduction.run(name, watchers(console, f"{count} {name}: "))
            entry = reproduction.entry(name)
            judged = tally([claim["verdict"] for claim in entry["claims"]])
            say(f"  failed: {entry['error']}" if entry["status"] == "failed" else f"  {judged}", markup=False)
    except (Interrupted, KeyboardInterrupt) as stop:
        raise continue_with(
            ["reproduce", "--preset", options.preset, "--out", str(out), *options.names], stop
        ) from None
    finally:
        page = reproduction.write()
    entries = [reproduction.entry(name) for name in reproduction.asked]
    failed = [entry for entry in entries if entry["status"] == "failed"]
    if distributed.is_main():
        print_table(console, [row for entry in entries for row in _rows(entry)])
        verdicts = tally([claim["verdict"] for entry in entries for claim in entry["claims"]])
        say(f"{verdicts}{f'; {len(failed)} of {total} experiments failed' if failed else ''}", highlight=False)
        say(f"page: {page}", highlight=False, markup=False, soft_wrap=True)
    return 1 if failed else 0


def _rows(entry: dict[str, Any]) -> list[dict[str, Any]]:
    from effml_shared.report import mean_with_interval

    if entry["status"] == "failed":
        row = {"claim": entry["error"], "measured": "", "95% interval": "", "verdict": "failed"}
        return [{"experiment": entry["name"], **row}]
    rows = []
    for place, claim in enumerate(entry["claims"]):
        mean, interval = mean_with_interval(claim)
        rows.append(
            {
                "experiment": "" if place else entry["name"],
                "claim": claim["text"],
                "measured": f"{mean}{claim['unit']}",
                "95% interval": f"{interval} n={claim['seeds']}",
                "verdict": claim["verdict"],
            }
        )
    return rows
