"""What can be typed behind `effml`: every command with its arguments, options and help."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from effml_shared.cli import compare, installed, reproduce, run, sweep
from effml_shared.errors import ConfigError

__all__ = ["parse"]

_PRESET = "smoke, cpu (default) or gpu"
_OVERRIDES = "any field of the configuration, such as model.width=256"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line; `command(options, console)` of the result carries it out.

    Args:
        arguments: the words after `effml`; None: of this process.

    Raises:
        ConfigError: there is no such command, argument or option.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    words = next((words for words in ("overrides", "names") if hasattr(options, words)), None)
    if any(word.startswith("-") for word in rest) or (rest and words is None):
        parser.error(f"unknown argument {rest[0]}")
    if words and rest:  # argparse leaves the words after an option behind
        setattr(options, words, getattr(options, words) + rest)
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (`{self.prog} --help` shows how)")


def _parser() -> _Parser:
    parser = _Parser(
        prog="effml", description="Re-test the claims of papers on efficient machine learning.", allow_abbrev=False
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, carry_out: Any, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=carry_out)
        return sub

    command("list", installed.list_experiments, "Show the experiments of the installed packages.")
    _add_run(
        command("run", run.run, "Run an experiment: baseline and method, over seeds, then its claims and a report."),
        out="new run directory (default: runs/NAME-TIME)",
    )
    resume = command("resume", run.resume, "Continue an interrupted run or sweep.")
    resume.add_argument("run", metavar="DIR", help="a run directory, or the directory of a sweep")
    report = command("report", run.report, "Draw the report of a run anew, finished or not.")
    report.add_argument("run", metavar="DIR", help="a run directory")
    side_by_side = command(
        "compare", compare.compare, "Put the claims of several runs side by side, and what differs between them."
    )
    side_by_side.add_argument(
        "runs", metavar="DIR", nargs="+", help="run directories, two or more; a sweep stands for all of its points"
    )
    everything = command(
        "reproduce",
        reproduce.reproduce,
        "Run all experiments, or the named ones, and put their claims on one page; goes on.",
    )
    everything.add_argument("names", metavar="NAME", nargs="*", help="experiments (default: all that are installed)")
    everything.add_argument("--preset", default="cpu", help=_PRESET)
    everything.add_argument(
        "--out", metavar="DIR", help="directory of the page and the runs (default: runs/reproduction-PRESET)"
    )
    _add_sweep(
        command(
            "sweep", sweep.sweep, "Run an experiment at every point of a grid, here or on a Slurm cluster; goes on."
        )
    )
    cite = command("cite", installed.cite, "Print BibTeX of the papers that experiments re-test.")
    cite.add_argument("names", metavar="NAME", nargs="+", help="as `effml list` shows it")
    command("doctor", installed.doctor, "Say what this machine can do.")
    return parser


def _add_run(parser: argparse.ArgumentParser, out: str) -> None:
    """Add what names an experiment and its configuration."""
    parser.add_argument("name", metavar="NAME", help="as `effml list` shows it")
    parser.add_argument("overrides", metavar="FIELD=VALUE", nargs="*", help=_OVERRIDES)
    parser.add_argument("--preset", default="cpu", help=_PRESET)
    parser.add_argument("--config", metavar="FILE", help="YAML file of fields, laid over the preset")
    parser.add_argument("--out", metavar="DIR", help=out)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    _add_run(parser, out="directory of the sweep (default: runs/sweep-NAME-PRESET); the same command again goes on")
    parser.add_argument(
        "--grid",
        metavar="FIELD=V1,V2",
        nargs="+",
        action="extend",
        required=True,
        help="values of a field, each as one would write it in FIELD=VALUE: lr=0.01,0.1 or seeds=[1,2],[3,4]; "
        "commas within brackets and quotes belong to the value",
    )
    parser.add_argument(
        "--executor", choices=("auto", "local", "slurm"), default="auto", help="auto: Slurm where there is one"
    )
    parser.add_argument(
        "--at-once", metavar="N", type=int, help="points that run at the same time (default: 1 here, all on Slurm)"
    )
    parser.add_argument(
        "--slurm",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="what a job asks of Slurm, in submitit's words: partition=gpu gpus_per_node=1 timeout_min=60 (default)",
    )
