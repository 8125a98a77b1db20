"""Jobs of a sweep on a Slurm cluster, submitted together as one array.

Before its time limit a run saves and is requeued by submitit; after a preemption by Slurm itself, if the cluster does
that. Either way the same job goes on from the checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from effml_shared.errors import ConfigError, EffmlError
from effml_shared.sweeps.jobs import Job, job_log, submitit

__all__ = ["SlurmJobs", "queued_jobs", "slurm_parameters"]

_TIME_LIMIT = 60  # minutes of a job unless the user says otherwise; submitit would ask for 5
_MOST_REQUEUES = 20  # after its time limit: a run that hangs must end some day
_COMMON = ("timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node", "name")  # submitit's own names, others Slurm's
_NOT_THE_USERS = ("nodes", "tasks_per_node", "ntasks_per_node", "array_parallelism", "stderr_to_stdout")
# States that squeue still lists for some minutes.
_OVER = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
_OVER |= {"REVOKED", "TIMEOUT"}


class SlurmJobs:
    """Jobs of a Slurm cluster, submitted together as one array.

    Args:
        folder: of the jobs' files, on a disk that all nodes see.
        job: makes the job of a point.
        ids: of the latest jobs; those still queued or running are watched.
        at_once: how many of an array run at the same time; None: all.
        parameters: as `slurm_parameters` gives them.
        ask_every: seconds between two questions to the cluster.
    """

    outlive = True
    room: int | None = None

    def __init__(
        self,
        folder: Path,
        job: Callable[[str], Job],
        ids: Mapping[str, str],
        at_once: int | None,
        parameters: Mapping[str, Any],
        *,
        ask_every: float = 5.0,
    ) -> None:
        self.folder, self.job, self.ids, self.ask_every = folder, job, dict(ids), ask_every
        parallel = {} if at_once is None else {"slurm_array_parallelism": at_once}
        self._executor = _slurm_executor(folder, {**parameters, **parallel})
        self._states, self._asked_at = queued_jobs(), time.monotonic()  # no answer now is an error: what still runs?

    def start(self, names: Sequence[str]) -> dict[str, str]:
        errors = submitit().core.utils
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            where = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}
            with submitit().helpers.clean_env():  # this may itself be within a job; but there is only one cluster
                os.environ.update(where)
                jobs = self._executor.submit_array([self.job(name) for name in names])
        except (errors.FailedJobError, errors.FailedSubmissionError, OSError) as error:
            raise EffmlError(f"Slurm did not take the jobs: {_last_line(str(error))}") from None
        self.ids |= {name: str(job.job_id) for name, job in zip(names, jobs, strict=True)}
        self._states |= {self.ids[name]: "PENDING" for name in names}
        self._asked_at = time.monotonic()
        return self.ids

    def alive(self) -> dict[str, str]:
        if time.monotonic() - self._asked_at >= self.ask_every:
            with contextlib.suppress(EffmlError):  # a cluster that is silent for a while still has its jobs
                self._states = queued_jobs()
            self._asked_at = time.monotonic()
        states = {name: self._states.get(job) for name, job in self.ids.items()}
        return {name: "queued" if state == "PENDING" else "running" for name, state in states.items() if state}

    def stop(self) -> None:
        """Leave them alone: they belong to the cluster."""

    def log(self, name: str) -> Path | None:
        return job_log(self.folder, self.ids.get(name))


def queued_jobs() -> dict[str, str]:
    """Return the states of the user's jobs that are not over, by job id.

    submitit would ask sacct, which clusters without a database lack.

    Raises:
        EffmlError: the cluster does not answer.
    """
    command = ["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise EffmlError(f"Slurm does not answer: {_last_line(said)}; --executor local does without it") from None
    rows = [line.split() for line in done.stdout.splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 2 and row[1] not in _OVER}


def slurm_parameters(words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Read `KEY=VALUE` words into submitit's parameters, after having submitit check them.

    Raises:
        ConfigError: submitit knows no such parameter, or refuses the value.
    """
    from omegaconf import OmegaConf

    parameters: dict[str, Any] = {"timeout_min": _TIME_LIMIT, "name": "effml"}
    for word in words:
        key, equals, value = word.partition("=")
        key = key.removeprefix("slurm_")
        if not equals or not value:
            raise ConfigError(f"--slurm: got {word!r}, expected KEY=VALUE")
        if key in _NOT_THE_USERS:
            raise ConfigError(
                f"--slurm: got {key}, expected another word: a point is one task, and --at-once says how many"
            )
        try:
            read = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={value}"]))
        except Exception:  # YAML's many parse errors
            raise ConfigError(f"--slurm {key}: got {value!r}, expected a YAML value") from None
        parameters[key if key in _COMMON else f"slurm_{key}"] = read[key]
    if "slurm_time" in parameters:  # the same under Slurm's own name
        parameters.pop("timeout_min")
    _slurm_executor(folder, parameters)
    return parameters


def _slurm_executor(folder: Path, parameters: Mapping[str, Any]) -> Any:
    try:
        executor = submitit().AutoExecutor(folder=folder, cluster="slurm", slurm_max_num_timeout=_MOST_REQUEUES)
        executor.update_parameters(stderr_to_stdout=True, **parameters)
    except (RuntimeError, NameError, AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"--slurm: {str(error).splitlines()[0]}") from None  # more lines repeat it
    return executor


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no reason given"
