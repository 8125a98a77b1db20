"""`effml compare`: the claims of several runs side by side, and what differs between them.

A few runs stand in columns, many in rows. A sweep stands for all of its points, told apart by what varies in it.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from effml_shared.cli.terminal import print_table
from effml_shared.errors import ConfigError

if TYPE_CHECKING:
    from effml_shared.runs import Run

__all__ = ["compare", "number_claims"]

_MOST_COLUMNS = 4  # more runs than these are rows
_MOST_FIELDS = 6  # in one table of rows


def compare(options: argparse.Namespace, console: Console) -> None:
    """Carry out `effml compare`."""
    runs, to_come = _open(options.runs)
    if len(runs) < 2:
        hint = f" and {to_come} points of a sweep that have not begun" if to_come else ""
        raise ConfigError(f"compare: got {len(runs)} run{hint}, expected two or more")
    names = {run.manifest["experiment"] for run in runs.values()}
    if len(names) > 1:
        raise ConfigError(f"compare: got runs of {', '.join(sorted(names))}, expected runs of one experiment")
    judged = {label: run.summary.get("claims", []) for label, run in runs.items()}
    fields = _differing(runs)
    (_print_rows if len(runs) > _MOST_COLUMNS else _print_columns)(console, judged, fields)
    unfinished = [label for label, run in runs.items() if run.summary["status"] != "finished"]
    console.print(f"{len(runs)} runs of {names.pop()}, {len(fields)} differing fields", highlight=False)
    if unfinished:
        console.print(f"not finished: {', '.join(unfinished)}", highlight=False, markup=False)
    if to_come:
        console.print(f"not begun: {to_come} points", highlight=False)


def number_claims(
    console: Console, judged: Mapping[str, list[dict[str, Any]]]
) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Print every claim with a short name; return the names, and what was measured for each of them, by run.

    Args:
        console: where to.
        judged: stored verdicts by run.
    """
    from effml_shared.report import mean_with_interval

    names: dict[str, str] = {}
    for verdict in itertools.chain(*judged.values()):
        text = verdict["claim"]["text"]
        if text not in names:
            names[text] = f"claim {len(names) + 1}"
            line = f"{names[text]}: {text}; in {verdict['claim']['unit'].strip()}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if names:
        console.print()
    cells = {
        run: {names[v["claim"]["text"]]: f"{mean_with_interval(v)[0]} ({v['verdict']})" for v in verdicts}
        for run, verdicts in judged.items()
    }
    return list(names.values()), cells


def _open(paths: Iterable[str]) -> tuple[dict[str, Run], int]:
    """Open runs and the points of sweeps, by what tells them apart; count the points that have not begun."""
    from effml_shared.runs import Run
    from effml_shared.sweeps.directory import Sweep, is_sweep

    paths = list(dict.fromkeys(map(str, paths)))
    runs: dict[str, Run] = {}
    to_come = 0
    for path in paths:
        if not is_sweep(path):
            runs[path] = Run(path)
            continue
        sweep = Sweep(path)
        for point in sweep.points:
            run = sweep.begun(point.name)
            label = ",".join(f"{field}={point.values[field]}" for field in sweep.varied())
            to_come += run is None
            if run is not None:
                runs[label if len(paths) == 1 else f"{path}: {label}"] = run
    return runs, to_come


def _differing(runs: Mapping[str, Run]) -> dict[str, dict[str, str]]:
    """Return fields and versions that are not the same everywhere, with their values by run."""
    from omegaconf import OmegaConf

    fields: dict[str, dict[str, str]] = {}
    for label, run in runs.items():
        flat = {
            **_flat(OmegaConf.to_container(OmegaConf.load(run.config_yaml))),
            **_flat(run.manifest["versions"], "version of "),
        }
        for name, value in flat.items():
            fields.setdefault(name, dict.fromkeys(runs, "–"))[label] = str(value)
    return {name: values for name, values in fields.items() if len(set(values.values())) > 1}


def _print_columns(
    console: Console, judged: dict[str, list[dict[str, Any]]], fields: dict[str, dict[str, str]]
) -> None:
    from effml_shared.report import mean_with_interval

    claims: dict[str, dict[str, str]] = {}
    for label, verdicts in judged.items():
        for verdict in verdicts:
            text, unit = verdict["claim"]["text"], verdict["claim"]["unit"]
            row = claims.setdefault(text, {"claim": text, **dict.fromkeys(judged, "–")})
            row[label] = f"{mean_with_interval(verdict)[0]}{unit} ({verdict['verdict']})"
    print_table(console, list(claims.values()))
    print_table(console, [{"differs": name, **values} for name, values in fields.items()])


def _print_rows(console: Console, judged: dict[str, list[dict[str, Any]]], fields: dict[str, dict[str, str]]) -> None:
    names, cells = number_claims(console, judged)
    if names:
        rows = [
            {"run": label, **{name: measured.get(name, "–") for name in names}} for label, measured in cells.items()
        ]
        print_table(console, rows)
    for start in range(0, len(fields), _MOST_FIELDS):
        part = list(fields)[start : start + _MOST_FIELDS]
        print_table(console, [{"run": label, **{name: fields[name][label] for name in part}} for label in judged])


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {name: value for key, node in tree.items() for name, value in _flat(node, f"{prefix}{key}.").items()}
