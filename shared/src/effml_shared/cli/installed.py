"""`effml list`, `effml cite`, `effml doctor`: what is installed here, whom it owes, what this machine can do."""

from __future__ import annotations

import argparse

from rich.console import Console

from effml_shared.cli.terminal import print_table
from effml_shared.errors import ConfigError

__all__ = ["cite", "doctor", "list_experiments"]


def list_experiments(options: argparse.Namespace, console: Console) -> None:
    """Carry out `effml list`."""
    from effml_shared.experiments import discover, find

    rows = [find(name) for name in sorted(discover())]
    if not rows:
        console.print("No experiments: install a package that has some, such as effml-optim.")
        return
    print_table(
        console,
        [
            {"experiment": e.name, "claim": e.title, "time": ", ".join(f"{p} {t}" for p, t in e.minutes.items())}
            for e in rows
        ],
    )
    console.print(f"Run one with: effml run {rows[0].name}", highlight=False)


def cite(options: argparse.Namespace, console: Console) -> None:
    """Carry out `effml cite`."""
    from effml_shared.citations import bibtex
    from effml_shared.experiments import find

    entries: dict[str, None] = {}  # in order, each once
    for name in options.names:
        experiment = find(name)
        if not experiment.papers:
            raise ConfigError(f"{name}: got no BibTeX of its paper, which is: {experiment.paper}")
        entries |= dict.fromkeys(map(bibtex, experiment.papers))
    print("\n\n".join(entries))


def doctor(options: argparse.Namespace, console: Console) -> None:
    """Carry out `effml doctor`."""
    from effml_shared.doctor import examine

    rows = examine()
    print_table(console, rows)
    missing = [row["what"] for row in rows if row["finding"] == "not installed"]
    console.print(
        f"effml can run here{'; optional and missing: ' + ', '.join(missing) if missing else ''}.", highlight=False
    )
