"""`effml sweep`: one experiment at every point of a grid, as jobs here or on a Slurm cluster.

While it goes on: which points run and how far they are. At the end: every point with its measured claims.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from effml_shared import distributed
from effml_shared.cli.compare import number_claims
from effml_shared.cli.sweep_display import SweepDisplay
from effml_shared.cli.terminal import continue_with, print_table
from effml_shared.errors import ConfigError, EffmlError, Interrupted

if TYPE_CHECKING:
    from effml_shared.sweeps.directory import Sweep
    from effml_shared.sweeps.jobs import Jobs

__all__ = ["resume_sweep", "sweep"]

_EVERY = 0.25  # seconds between two looks at the jobs


def sweep(options: argparse.Namespace, console: Console) -> int:
    """Carry out `effml sweep`; nothing is written before everything is known to be right."""
    from effml_shared.experiments import find
    from effml_shared.sweeps.directory import Sweep, is_sweep
    from effml_shared.sweeps.grid import parse_grid
    from effml_shared.sweeps.jobs import choose_executor
    from effml_shared.sweeps.slurm_jobs import queued_jobs, slurm_parameters

    if options.at_once is not None and options.at_once < 1:
        raise ConfigError(f"--at-once: got {options.at_once}, expected a number of points >= 1")
    experiment, grid = find(options.name), parse_grid(options.grid)
    path = Path(options.out or Path("runs") / f"sweep-{experiment.name}-{options.preset}")
    executor = choose_executor(options.executor, options.slurm)
    before = Sweep(path).jobs if is_sweep(path) else {}
    if before.get("ids") and before["executor"] != executor:
        if options.executor != "auto" or options.slurm:
            raise ConfigError(
                f"--executor: got {executor}, expected {before['executor']}, where the jobs of {path} are"
            )
        executor = before["executor"]
    if executor == "slurm":
        slurm_parameters(options.slurm, path.absolute() / "jobs")
        queued_jobs()
    made = Sweep.create(path, experiment, options.preset, grid, yaml=options.config, overrides=options.overrides)
    made.record(executor=executor, at_once=options.at_once, slurm=options.slurm)
    return _carry_out(made, console)


def resume_sweep(path: str, console: Console) -> int:
    """Carry out `effml resume` of a sweep: start what is not finished, watch what still runs."""
    from effml_shared.sweeps.directory import Sweep

    return _carry_out(Sweep(path), console)


def _carry_out(sweep: Sweep, console: Console) -> int:
    if distributed.world_size() > 1:
        raise ConfigError(f"sweep: got {distributed.world_size()} processes, expected one, which starts the others")
    todo = sweep.unfinished()
    total = len(sweep.points)
    console.print(
        f"{sweep.experiment}: {total} point{'s' * (total != 1)}, {total - len(todo)} finished before; {sweep.path}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    logs: dict[str, Path | None] = {}
    if todo:
        jobs = _jobs(sweep)
        _watch(sweep, jobs, todo, console)
        logs = {name: jobs.log(name) for name in todo}
    return _conclude(sweep, logs, console)


def _conclude(sweep: Sweep, logs: Mapping[str, Path | None], console: Console) -> int:
    """Print every point's claims, what went wrong at the others, and how to look closer; return the exit code."""
    statuses = {point.name: sweep.outcome(point.name) for point in sweep.points}
    finished = {name: sweep.begun(name) for name, status in statuses.items() if status == "finished"}
    judged = {name: run.summary.get("claims", []) for name, run in finished.items() if run is not None}
    claims, cells = number_claims(console, judged)
    print_table(
        console,
        [
            {
                **{field: point.values[field] for field in sweep.varied()},
                "status": statuses[point.name],
                **{claim: cells.get(point.name, {}).get(claim, "") for claim in claims},
            }
            for point in sweep.points
        ],
    )
    failed = [name for name, status in statuses.items() if status != "finished"]
    for name in failed:
        log = logs.get(name)
        words = f"{name}: {_reason(sweep, name, log)}{f'; log: {log}' if log else ''}"
        console.print(words, highlight=False, markup=False, soft_wrap=True)
    quoted = shlex.quote(str(sweep.path))
    if failed:
        console.print(f"try again: effml resume {quoted}", highlight=False, markup=False, soft_wrap=True)
    if len(statuses) - len(failed) > 1:
        console.print(f"what differs: effml compare {quoted}", highlight=False, markup=False, soft_wrap=True)
    return 1 if failed else 0


def _reason(sweep: Sweep, name: str, log: Path | None) -> str:
    """Say in one line why a point has not finished."""
    try:
        run = sweep.begun(name)
    except EffmlError as error:
        return str(error)
    if run is not None and run.summary.get("error"):
        return str(run.summary["error"])
    lines = log.read_text(errors="replace").splitlines() if log is not None else []
    ours = [line.removeprefix("effml: error: ") for line in lines if line.startswith("effml: error: ")]
    if ours:
        return ours[-1]
    return "its job ended before the run did" if run is not None or lines else "its job never began"


def _jobs(sweep: Sweep) -> Jobs:
    from effml_shared.sweeps.jobs import Job, choose_executor
    from effml_shared.sweeps.local_jobs import LocalJobs
    from effml_shared.sweeps.slurm_jobs import SlurmJobs, slurm_parameters

    root = sweep.path.absolute()
    folder, names = root / "jobs", [point.name for point in sweep.points]
    ids, at_once, slurm = sweep.jobs["ids"], sweep.jobs["at_once"], sweep.jobs["slurm"]

    def job(name: str) -> Job:
        out, config = str(root / name), str(root / "points" / f"{name}.yaml")
        begin = ["run", sweep.experiment, "--preset", sweep.preset, "--config", config, "--out", out]
        return Job(run=out, begin=begin, lock=str(folder / f"{name}.lock"))

    if choose_executor(sweep.jobs["executor"], slurm) == "slurm":
        return SlurmJobs(folder, job, ids, at_once, slurm_parameters(slurm, folder))
    return LocalJobs(folder, job, names, ids, at_once or 1)


def _watch(sweep: Sweep, jobs: Jobs, todo: list[str], console: Console) -> None:
    """Start the points in turn and wait for all of them.

    Raises:
        Interrupted: SIGINT or SIGTERM came; the jobs of this machine have saved, those of a cluster go on.
    """
    alive = jobs.alive()
    waiting = [name for name in todo if name not in alive]
    with _caught_signals() as caught, SweepDisplay(sweep, console) as display:
        try:
            while True:
                room = len(waiting) if jobs.room is None else jobs.room
                if waiting and room and not caught:
                    sweep.record(ids=jobs.start(waiting[:room]))
                    waiting = waiting[room:]
                alive = jobs.alive()
                display.show(alive, waiting)
                if caught and not jobs.outlive:
                    jobs.stop()
                if (caught and jobs.outlive) or (not alive and (caught or not waiting)):
                    break
                time.sleep(_EVERY)
        except KeyboardInterrupt:  # the second one: whoever presses it does not want to wait for checkpoints
            caught.append(signal.SIGINT)
    if not caught or not sweep.unfinished():
        return
    if jobs.outlive and alive:
        arrays = sorted({sweep.jobs["ids"][name].partition("_")[0] for name in alive})
        look, cancel = shlex.join(["effml", "resume", str(sweep.path)]), shlex.join(["scancel", *arrays])
        raise Interrupted(f"the jobs go on without this command; look again: {look}; stop them: {cancel}", caught[0])
    raise continue_with(["resume", str(sweep.path)], Interrupted("", caught[0]))


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list; the second of a kind acts as it always did."""
    caught: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def catch(signum: int, frame: Any) -> None:
        caught.append(signum)
        signal.signal(signum, before[signal.Signals(signum)])

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
