"""`effml list | run | resume | report | compare | reproduce | cite | doctor`.

Every command ends with an answer. Whatever is wrong with the input is one line on stderr and exit code 2; Ctrl-C
leaves a checkpoint and prints the command that continues (exit code 130, SIGTERM 143).
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from effml_shared import distributed
from effml_shared.errors import ConfigError, EffmlError, Interrupted

__all__ = ["main"]

_MARKS = {"holds": "green", "does not hold": "red", "inconclusive": "yellow", "failed": "magenta"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (`{self.prog} --help` shows how)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    console = Console()
    try:
        options = _parse(arguments)
        if not sys.stdout.isatty() and console.width < 100:
            console = Console(width=120)  # piped output is read in wide windows
        with distributed.launched():
            return options.command(options, console) or 0
    except Interrupted as stop:
        _say(f"effml: {stop}")
        return 128 + stop.signum
    except KeyboardInterrupt:
        _say("effml: stopped before anything could be saved")
        return 130
    except EffmlError as error:
        _say(f"effml: error: {error}")
        return 2
    except OSError as error:  # what no floor below has put into better words: a read-only report, a closed pipe
        _say(f"effml: error: {error}")
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    words = next((words for words in ("overrides", "names") if hasattr(options, words)), None)
    if any(word.startswith("-") for word in rest) or (rest and words is None):
        parser.error(f"unknown argument {rest[0]}")
    if words and rest:  # argparse leaves the words after an option behind
        setattr(options, words, getattr(options, words) + rest)
    return options


def _parser() -> _Parser:
    parser = _Parser(
        prog="effml", description="Re-test the claims of papers on efficient machine learning.", allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=run)
        return sub

    command("list", _list, "Show the experiments of the installed packages.")
    run = command("run", _run, "Run an experiment: baseline and method, over seeds, then its claims and a report.")
    run.add_argument("name", metavar="NAME", help="as `effml list` shows it")
    run.add_argument(
        "overrides", metavar="FIELD=VALUE", nargs="*", help="any field of the configuration, such as model.width=256"
    )
    run.add_argument("--preset", default="cpu", help="smoke, cpu (default) or gpu")
    run.add_argument("--config", metavar="FILE", help="YAML file of fields, laid over the preset")
    run.add_argument("--out", metavar="DIR", help="new run directory (default: runs/NAME-TIME)")
    for name, function, text in (
        ("resume", _resume, "Continue an interrupted run."),
        ("report", _report, "Draw the report of a run anew, finished or not."),
    ):
        command(name, function, text).add_argument("run", metavar="DIR", help="a run directory")
    compare = command(
        "compare", _compare, "Put the claims of several runs side by side, and what differs between them."
    )
    compare.add_argument("runs", metavar="DIR", nargs="+", help="run directories, two or more")
    reproduce = command(
        "reproduce", _reproduce, "Run all experiments, or the named ones, and put their claims on one page; goes on."
    )
    reproduce.add_argument("names", metavar="NAME", nargs="*", help="experiments (default: all that are installed)")
    reproduce.add_argument("--preset", default="cpu", help="smoke, cpu (default) or gpu")
    reproduce.add_argument(
        "--out", metavar="DIR", help="directory of the page and the runs (default: runs/reproduction-PRESET)"
    )
    cite = command("cite", _cite, "Print BibTeX of the papers that experiments re-test.")
    cite.add_argument("names", metavar="NAME", nargs="+", help="as `effml list` shows it")
    command("doctor", _doctor, "Say what this machine can do.")
    return parser


def _list(options: argparse.Namespace, console: Console) -> None:
    from effml_shared.experiments import discover, find

    rows = [find(name) for name in sorted(discover())]
    if not rows:
        console.print("No experiments: install a package that has some, such as effml-optim.")
        return
    _print(
        console,
        [
            {"experiment": e.name, "claim": e.title, "time": ", ".join(f"{p} {t}" for p, t in e.minutes.items())}
            for e in rows
        ],
    )
    console.print(f"Run one with: effml run {rows[0].name}", highlight=False)


def _run(options: argparse.Namespace, console: Console) -> None:
    from effml_shared.config import to_yaml
    from effml_shared.experiments import find
    from effml_shared.runs import Run

    experiment = find(options.name)
    config = experiment.configure(options.preset, yaml=options.config, overrides=options.overrides)
    stamp = distributed.from_main(int(datetime.datetime.now().strftime("%Y%m%d%H%M%S")))
    path = Path(options.out or Path("runs") / f"{experiment.name}-{stamp}")
    manifest = {"experiment": experiment.name, "preset": options.preset}
    run = Run.create(path, manifest, to_yaml(config), watch=_watchers(console))
    _execute(experiment, config, run, console)


def _resume(options: argparse.Namespace, console: Console) -> None:
    from effml_shared.experiments import find
    from effml_shared.runs import Run

    run = Run(options.run, watch=_watchers(console))
    experiment = find(run.manifest["experiment"])
    if run.summary["status"] == "finished":
        console.print(f"{run.path} is finished; its report: {run.path / 'report.html'}", highlight=False)
        return
    config = experiment.configure(run.manifest["preset"], yaml=run.config_yaml)
    _execute(experiment, config, run, console)


def _execute(experiment: Any, config: Any, run: Any, console: Console) -> None:
    from effml_shared.report import claims_table, write_report

    main = distributed.is_main()
    if main:
        console.print(f"{experiment.name}: {experiment.title}\nrun directory {run.path}", highlight=False)
    try:
        experiment.execute(config, run)
    except (Interrupted, KeyboardInterrupt) as stop:
        raise _continue_with(["resume", str(run.path)], stop) from None
    if main:
        report = write_report(run, experiment)
        _print(console, run.summary["table"])
        _print(console, claims_table(run.summary["claims"]))
        console.print(f"report: {report}", highlight=False, soft_wrap=True)


def _report(options: argparse.Namespace, console: Console) -> None:
    from effml_shared.experiments import find
    from effml_shared.report import claims_table, write_report
    from effml_shared.runs import Run

    run = Run(options.run)
    path = write_report(run, find(run.manifest["experiment"]))
    if run.summary.get("claims"):
        _print(console, claims_table(run.summary["claims"]))
    else:
        done = len(run.summary["trials"])
        console.print(f"{run.summary['status']}: {done} trials finished, no claim judged yet", highlight=False)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)


def _compare(options: argparse.Namespace, console: Console) -> None:
    from omegaconf import OmegaConf

    from effml_shared.report import number
    from effml_shared.runs import Run

    if len(options.runs) < 2:
        raise ConfigError(f"compare: got {len(options.runs)} run, expected two or more")
    runs = {str(path): Run(path) for path in options.runs}
    names = {run.manifest["experiment"] for run in runs.values()}
    if len(names) > 1:
        raise ConfigError(f"compare: got runs of {', '.join(sorted(names))}, expected runs of one experiment")
    claims: dict[str, dict[str, Any]] = {}
    for path, run in runs.items():
        for verdict in run.summary.get("claims", []):
            cell = f"{number(verdict['mean'])}{verdict['claim']['unit']} ({verdict['verdict']})"
            claims.setdefault(verdict["claim"]["text"], {"claim": verdict["claim"]["text"]})[path] = cell
    _print(console, [{"claim": "", **dict.fromkeys(runs, "–"), **row} for row in claims.values()])
    fields: dict[str, dict[str, Any]] = {}
    for path, run in runs.items():
        flat = {
            **_flat(OmegaConf.to_container(OmegaConf.load(run.config_yaml))),
            **_flat(run.manifest["versions"], "version of "),
        }
        for name, value in flat.items():
            fields.setdefault(name, {"differs": name, **dict.fromkeys(runs, "–")})[path] = str(value)
    different = [row for row in fields.values() if len({row[path] for path in runs}) > 1]
    _print(console, different)
    unfinished = [path for path, run in runs.items() if run.summary["status"] != "finished"]
    console.print(f"{len(runs)} runs of {names.pop()}, {len(different)} differing fields", highlight=False)
    if unfinished:
        console.print(f"not finished: {', '.join(unfinished)}", highlight=False)


def _reproduce(options: argparse.Namespace, console: Console) -> int:
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
            reproduction.run(name, _watchers(console, f"{count} {name}: "))
            entry = reproduction.entry(name)
            judged = tally([claim["verdict"] for claim in entry["claims"]])
            say(f"  failed: {entry['error']}" if entry["status"] == "failed" else f"  {judged}", markup=False)
    except (Interrupted, KeyboardInterrupt) as stop:
        raise _continue_with(
            ["reproduce", "--preset", options.preset, "--out", str(out), *options.names], stop
        ) from None
    finally:
        page = reproduction.write()
    entries = [reproduction.entry(name) for name in reproduction.asked]
    failed = [entry for entry in entries if entry["status"] == "failed"]
    if distributed.is_main():
        _print(console, [row for entry in entries for row in _rows(entry)])
        verdicts = tally([claim["verdict"] for entry in entries for claim in entry["claims"]])
        say(f"{verdicts}{f'; {len(failed)} of {total} experiments failed' if failed else ''}", highlight=False)
        say(f"page: {page}", highlight=False, markup=False, soft_wrap=True)
    return 1 if failed else 0


def _rows(entry: dict[str, Any]) -> list[dict[str, Any]]:
    from effml_shared.report import number

    if entry["status"] == "failed":
        row = {"claim": entry["error"], "measured": "", "95% interval": "", "verdict": "failed"}
        return [{"experiment": entry["name"], **row}]
    return [
        {
            "experiment": "" if place else entry["name"],
            "claim": claim["text"],
            "measured": f"{number(claim['mean'], 3)}{claim['unit']}",
            "95% interval": f"[{number(claim['low'], 3)}, {number(claim['high'], 3)}] n={claim['seeds']}",
            "verdict": claim["verdict"],
        }
        for place, claim in enumerate(entry["claims"])
    ]


def _cite(options: argparse.Namespace, console: Console) -> None:
    from effml_shared.citations import bibtex
    from effml_shared.experiments import find

    entries: dict[str, None] = {}  # in order, each once
    for name in options.names:
        experiment = find(name)
        if not experiment.papers:
            raise ConfigError(f"{name}: got no BibTeX of its paper, which is: {experiment.paper}")
        entries |= dict.fromkeys(map(bibtex, experiment.papers))
    print("\n\n".join(entries))


def _doctor(options: argparse.Namespace, console: Console) -> None:
    from effml_shared.doctor import examine

    rows = examine()
    _print(console, rows)
    missing = [row["what"] for row in rows if row["finding"] == "not installed"]
    console.print(
        f"effml can run here{'; optional and missing: ' + ', '.join(missing) if missing else ''}.", highlight=False
    )


def _watchers(console: Console, within: str = "") -> list[Any]:
    from effml_shared.progress import ProgressBar

    return [ProgressBar(console, within=within)] if distributed.is_main() else []


def _continue_with(words: list[str], stop: Interrupted | KeyboardInterrupt) -> Interrupted:
    signum = stop.signum if isinstance(stop, Interrupted) else signal.SIGINT
    return Interrupted(f"interrupted; continue with: effml {shlex.join(words)}", signum)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {name: value for key, node in tree.items() for name, value in _flat(node, f"{prefix}{key}.").items()}


def _print(console: Console, rows: list[dict[str, Any]]) -> None:
    from effml_shared.report import number

    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for key in rows[0]:
        numeric = all(isinstance(row.get(key), int | float | None) for row in rows)
        table.add_column(key, justify="right" if numeric else "left", no_wrap=key == "verdict")
    for row in rows:
        table.add_row(*(f"[{_MARKS[v]}]{v}[/]" if v in _MARKS else number(v).replace("[", r"\[") for v in row.values()))
    console.print(table)
    console.print()


def _say(line: str) -> None:
    if distributed.is_main():
        print(" ".join(line.split()), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
