"""`effml run`, `effml resume`, `effml report`: one experiment and its run directory."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from effml_shared import distributed
from effml_shared.cli.terminal import continue_with, print_table, watchers
from effml_shared.errors import Interrupted

__all__ = ["report", "resume", "run"]


def run(options: argparse.Namespace, console: Console) -> None:
    """Carry out `effml run`."""
    from effml_shared.config import to_yaml
    from effml_shared.experiments import find
    from effml_shared.runs import Run

    experiment = find(options.name)
    config = experiment.configure(options.preset, yaml=options.config, overrides=options.overrides)
    stamp = distributed.from_main(int(datetime.datetime.now().strftime("%Y%m%d%H%M%S")))
    path = Path(options.out or Path("runs") / f"{experiment.name}-{stamp}")
    manifest = {"experiment": experiment.name, "preset": options.preset}
    made = Run.create(path, manifest, to_yaml(config), watch=watchers(console))
    _execute(experiment, config, made, console)


def resume(options: argparse.Namespace, console: Console) -> int:
    """Carry out `effml resume`."""
    from effml_shared.cli.sweep import resume_sweep
    from effml_shared.experiments import find
    from effml_shared.runs import Run
    from effml_shared.sweeps.directory import is_sweep

    if is_sweep(options.run):
        return resume_sweep(options.run, console)
    found = Run(options.run, watch=watchers(console))
    experiment = find(found.manifest["experiment"])
    if found.summary["status"] == "finished":
        console.print(f"{found.path} is finished; its report: {found.path / 'report.html'}", highlight=False)
        return 0
    config = experiment.configure(found.manifest["preset"], yaml=found.config_yaml)
    _execute(experiment, config, found, console)
    return 0


def report(options: argparse.Namespace, console: Console) -> None:
    """Carry out `effml report`."""
    from effml_shared.experiments import find
    from effml_shared.report import claims_table, write_report
    from effml_shared.runs import Run

    found = Run(options.run)
    path = write_report(found, find(found.manifest["experiment"]))
    if found.summary.get("claims"):
        print_table(console, claims_table(found.summary["claims"]))
    else:
        done = len(found.summary["trials"])
        console.print(f"{found.summary['status']}: {done} trials finished, no claim judged yet", highlight=False)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


def _execute(experiment: Any, config: Any, run: Any, console: Console) -> None:
    from effml_shared.report import claims_table, write_report

    main = distributed.is_main()
    if main:
        console.print(f"{experiment.name}: {experiment.title}\nrun directory {run.path}", highlight=False)
    try:
        experiment.execute(config, run)
    except (Interrupted, KeyboardInterrupt) as stop:
        raise continue_with(["resume", str(run.path)], stop) from None
    if main:
        report = write_report(run, experiment)
        print_table(console, run.summary["table"])
        print_table(console, claims_table(run.summary["claims"]))
        console.print(f"report: {report}", highlight=False, soft_wrap=True)
