"""A point of a sweep as a job of submitit, and what is asked of all jobs, wherever they run.

submitit starts, queues, times and requeues; a job is one `effml run` or `effml resume` in an interpreter of its own,
and what came of it is read from its run directory. submitit pickles the job it is given, which is the name of the
class `Job` and some strings, and reads that in the job's process; nothing is read back from a pickle here.

While a job lives it holds the lock of its point, which ends with it however it ends: that is how a later session
knows that a point still runs on this machine, and why a point never runs twice at once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from effml_shared.errors import ConfigError, require

__all__ = ["Job", "Jobs", "choose_executor", "ignored", "job_log", "submitit"]


@dataclass
class Job:
    """One point of a sweep: begins its run, or goes on where an earlier job was stopped.

    Attributes:
        run: the run directory.
        begin: the words after `effml` that begin it.
        lock: file that is locked while the job lives, and then holds the process id of its command.
        environment: variables that differ from this process's.
    """

    run: str
    begin: list[str]
    lock: str
    environment: dict[str, str] = field(default_factory=dict)
    process: int | None = None

    def __call__(self) -> None:
        import fcntl

        with Path(self.lock).open("a") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: there the queue alone must do
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.truncate(0)
            begun = (Path(self.run) / "manifest.json").exists()
            words = ["resume", self.run] if begun else self.begin
            with ignored(signal.SIGUSR1, signal.SIGUSR2):  # Slurm sends submitit's signal to the command as well
                command = subprocess.Popen(
                    [sys.executable, "-m", "effml_shared.cli", *words],
                    env={**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"},
                    pass_fds=[lock.fileno()],  # so that the lock outlives a kill of this process alone
                    start_new_session=True,  # Ctrl-C is for the sweep, which asks once
                )
            with command:
                lock.write(str(command.pid))
                lock.flush()
                self.process = command.pid
                code = command.wait()
        if code:
            raise SystemExit(code if code > 0 else 128 - code)

    def checkpoint(self) -> Any:
        """Let the run save and end; return what is to be run instead. submitit calls this before a time limit."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has just ended by itself
                os.kill(self.process, signal.SIGTERM)
                os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOWAIT)  # `__call__` still waits for it
        return DelayedSubmission(Job(self.run, self.begin, self.lock, self.environment))


class Jobs(Protocol):
    """The jobs of one sweep, each known by the name of its point."""

    outlive: bool  # whether they go on when this process ends

    @property
    def room(self) -> int | None:
        """How many may be started beside those alive; None: as many as there are."""

    def start(self, names: Sequence[str]) -> dict[str, str]:
        """Start jobs and return their ids."""

    def alive(self) -> dict[str, str]:
        """Return the jobs that are `"queued"` or `"running"`."""

    def stop(self) -> None:
        """Ask those alive to save and end; may be called again, and asks each once."""

    def log(self, name: str) -> Path | None:
        """Return the file with what the latest job of a point has printed."""


def submitit() -> Any:
    """Import submitit.

    Raises:
        MissingExtra: it is not installed.
    """
    return require("submitit", extra="effml-shared[sweep]", purpose="for sweeps")


def choose_executor(asked: str, slurm: Sequence[str]) -> str:
    """Return `"local"` or `"slurm"` for what was asked, `"auto"` being Slurm where its commands are.

    Raises:
        MissingExtra: submitit is not installed.
        ConfigError: submitit does not know this system, or there are words for Slurm and the jobs would run elsewhere.
    """
    if os.name != "posix":
        raise ConfigError(f"sweep: got {sys.platform}, expected Linux or macOS")
    automatic = submitit().AutoExecutor
    executor = asked
    if asked == "auto":
        executor = "slurm" if slurm or automatic.which() == "slurm" else "local"
    if slurm and executor == "local":
        raise ConfigError("--slurm: got it with --executor local, expected --executor slurm")
    return executor


@contextlib.contextmanager
def ignored(*signals: signal.Signals) -> Iterator[None]:
    """Start a process that ignores signals: it takes that over from the one that starts it."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def job_log(folder: Path, job: str | None) -> Path | None:
    """Return the file with what a job has printed; None: there is none."""
    path = folder / f"{job}_0_log.out"
    return path if job is not None and path.exists() else None
