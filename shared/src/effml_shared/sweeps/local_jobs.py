"""Jobs of a sweep on this machine, some at a time."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from effml_shared.sweeps.jobs import Job, ignored, job_log, submitit

__all__ = ["LocalJobs", "share_of_machine"]

_FOREVER = 60 * 24 * 365  # minutes; submitit would stop a local job after 2


class LocalJobs:
    """Jobs on this machine, `at_once` at a time, which share its cores and take its GPUs in turn.

    Args:
        folder: of the jobs' files.
        job: makes the job of a point.
        names: all points, of which some may still run since an earlier session.
        ids: of the latest jobs.
        at_once: how many run at the same time.
    """

    outlive = False

    def __init__(
        self, folder: Path, job: Callable[[str], Job], names: Sequence[str], ids: Mapping[str, str], at_once: int
    ) -> None:
        self.folder, self.job, self.ids, self.at_once = folder, job, dict(ids), at_once
        folder.mkdir(parents=True, exist_ok=True)
        self._executor = submitit().AutoExecutor(folder=folder, cluster="local")
        self._executor.update_parameters(timeout_min=_FOREVER, stderr_to_stdout=True)
        self._started: dict[str, Any] = {}  # submitit's job of each point
        self._slots: dict[str, int] = {}
        self._earlier = {name for name in names if self._locked(name)}
        self._asked: set[str] = set()

    @property
    def room(self) -> int | None:
        return max(self.at_once - len(self.alive()), 0)

    def start(self, names: Sequence[str]) -> dict[str, str]:
        for name in names:
            taken = {self._slots[other] for other in self.alive() if other in self._slots}
            self._slots[name] = min(set(range(len(taken) + 1)) - taken)
            job = self.job(name)
            job.environment = share_of_machine(self._slots[name], self.at_once)
            self._lock(name).write_text("")  # no process of an earlier job is meant
            with ignored(signal.SIGINT):
                self._started[name] = self._executor.submit(job)
            self.ids[name] = str(self._started[name].job_id)
        return self.ids

    def alive(self) -> dict[str, str]:
        self._earlier = {name for name in self._earlier if self._locked(name)}
        ours = [name for name, job in self._started.items() if not job.done()]
        return dict.fromkeys([*ours, *self._earlier], "running")

    def stop(self) -> None:
        for name in set(self.alive()) - self._asked:
            if process := self._lock(name).read_text():  # empty: the job has yet to start its command
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(process), signal.SIGTERM)
                self._asked.add(name)

    def log(self, name: str) -> Path | None:
        return job_log(self.folder, self.ids.get(name))

    def _lock(self, name: str) -> Path:
        return Path(self.job(name).lock)

    def _locked(self, name: str) -> bool:
        import fcntl

        try:
            with self._lock(name).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # there is none, or there are no locks here
            return False
        return False


def share_of_machine(slot: int, at_once: int) -> dict[str, str]:
    """Return the environment of the job in a slot: its share of the cores, and one GPU where there are some.

    The user's own `OMP_NUM_THREADS` stands.
    """
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(cores // at_once, 1))
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = [str(n) for n in range(torch.cuda.device_count())] if listed is None else listed.split(",")
    return {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": devices[slot % len(devices)] if devices else ""}
