"""A run directory: the only thing that experiment, report, resume and compare share.

    config.yaml      the resolved configuration       manifest.json   experiment, versions, machine, git commit
    metrics.jsonl    one line per step of any trial   summary.json    results of finished trials, claims, status
    checkpoints/     of the trial in progress         plots/, report.html

A run is a sequence of *trials* (one training each). A finished trial is remembered in `summary.json` and never run
again; one in progress continues from its checkpoint. Every file is whole at every moment, so it can be read at any.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effml_shared import distributed
from effml_shared.checkpoint import Checkpoints
from effml_shared.errors import CheckpointError
from effml_shared.files import unwritten, write_whole
from effml_shared.loop import Hook, Loop

__all__ = ["Run", "Trial", "describe_machine"]

_BEGUN = ".begun"  # stands in a run directory until all of its first files do


@dataclass(frozen=True)
class Trial:
    """What one training of a run hands to its `Loop`: where to save, and who watches."""

    name: str
    checkpoints: Checkpoints
    hooks: list[Hook]


class Run:
    """An existing run directory; `create` makes one, `Run(path)` opens one.

    Args:
        path: the directory.
        watch: more hooks for every trial, such as a progress bar.
    """

    def __init__(self, path: str | Path, *, watch: list[Hook] | None = None) -> None:
        self.path = Path(path)
        self.watch = watch or []
        self._recorded: set[str] = set()  # trials that this session has begun
        try:
            self.manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
            self.summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
            missing = {"experiment", "preset"} - set(self.manifest) | {"status", "trials"} - set(self.summary)
            if missing:
                raise ValueError(missing)
        except (OSError, ValueError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "manifest.json or summary.json is damaged"
            if _cut_short(self.path):
                reason = "cut short before anything ran: run it again"
            raise CheckpointError(
                f"{path}: got no readable run ({reason}), expected a directory that `effml run` made"
            ) from None

    @classmethod
    def create(
        cls, path: str | Path, manifest: Mapping[str, Any], config_yaml: str, *, watch: list[Hook] | None = None
    ) -> Run:
        """Make a run directory, in place of one whose making was cut short.

        Raises:
            CheckpointError: the place is taken or cannot be written.
        """
        path = Path(path)
        with distributed.agreed("making the run directory"):
            if distributed.is_main():
                try:
                    if path.exists() and not _cut_short(path) and (not path.is_dir() or any(path.iterdir())):
                        hint = (
                            "`effml resume` continues it"
                            if (path / "manifest.json").exists()
                            else "choose another --out"
                        )
                        raise CheckpointError(
                            f"--out {path}: got a place that is in use, expected a new directory; {hint}"
                        )
                    path.mkdir(parents=True, exist_ok=True)
                    (path / _BEGUN).touch()
                    write_whole(path / "config.yaml", config_yaml)
                    write_whole(path / "summary.json", json.dumps({"status": "running", "trials": {}}))
                    write_whole(path / "manifest.json", json.dumps({**manifest, **describe_machine()}, indent=1))
                    (path / _BEGUN).unlink()
                except OSError as error:
                    raise CheckpointError(
                        f"--out {path}: cannot write there ({error.strerror}); choose another --out"
                    ) from None
        return cls(path, watch=watch)

    @property
    def config_yaml(self) -> Path:
        """Path of the resolved configuration."""
        return self.path / "config.yaml"

    def update(self, **fields: Any) -> None:
        """Set fields of `summary.json`."""
        self.summary |= fields
        if distributed.is_main():
            write_whole(self.path / "summary.json", json.dumps(_finite(self.summary), indent=1))

    def trial(self, name: str, train: Callable[[Trial], dict[str, Any]], *, mesh: Any = None) -> dict[str, Any]:
        """Return what `train` returned for this trial, running it only if it has not finished before.

        Args:
            name: unique in the run; its first part (up to `/`) is the method that plots group by.
            train: runs one `Loop` with the trial's checkpoints and hooks, returns plain JSON values.
            mesh: device mesh of a sharded model.
        """
        if name not in self.summary["trials"]:
            directory = self.path / "checkpoints" / name.replace("/", "_")
            checkpoints = Checkpoints(directory, mesh=mesh)
            # Lines behind a checkpoint can stand there from another session's last trial, or of this very trial.
            stale = not self._recorded or name in self._recorded
            self._recorded.add(name)
            recorder = [_Recorder(self.path / "metrics.jsonl", name, stale)] if distributed.is_main() else []
            result = train(Trial(name, checkpoints, [*recorder, *self.watch]))
            self.update(trials={**self.summary["trials"], name: _finite(result)})
            checkpoints.remove()
        return self.summary["trials"][name]

    def expect(self, samples: int) -> None:
        """Say how many samples all trials together will consume, for the time left.

        Finished trials count as done by the `samples` in their result.
        """
        done = sum(result.get("samples", 0) for result in self.summary["trials"].values())
        for hook in self.watch:
            if hasattr(hook, "expect"):
                hook.expect(samples - done)

    def metrics(self) -> list[dict[str, Any]]:
        """Return every complete line of `metrics.jsonl`."""
        return _rows(self.path / "metrics.jsonl")


def _cut_short(path: Path) -> bool:
    """Say whether `Run.create` began this directory and was killed before the last of its first files stood."""
    return (path / _BEGUN).exists() and not (path / "manifest.json").exists()


class _Recorder(Hook):
    """Append a line per step and evaluation; where there may be some, first drop the trial's after its checkpoint."""

    def __init__(self, path: Path, trial: str, stale: bool) -> None:
        self.path, self.trial, self.stale = path, trial, stale

    def on_start(self, loop: Loop) -> None:
        if self.stale and self.path.exists():
            rows = _rows(self.path)
            kept = [row for row in rows if row["trial"] != self.trial or row["step"] <= loop.clock.step]
            write_whole(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.stale = True  # should the trial start another loop
        try:
            self.file = self.path.open("ab", buffering=0)  # nothing is left to be written when it is closed
        except OSError as error:
            raise unwritten(self.path, error) from None

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        self._write(loop, metrics)

    def on_evaluate(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        self._write(loop, {f"eval_{name}": value for name, value in metrics.items()})

    def on_end(self, loop: Loop) -> None:
        self.file.close()

    def _write(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        clock = loop.clock
        row = {"trial": self.trial, "step": clock.step, "samples": clock.samples, "seconds": round(clock.seconds, 6)}
        line = json.dumps(_finite({**row, **metrics, "tokens": clock.tokens})).encode() + b"\n"
        begin = self.file.tell()
        try:
            while line:
                line = line[self.file.write(line) :]
        except OSError as error:
            self.file.truncate(begin)  # no half a line
            raise unwritten(self.path, error) from None


def describe_machine() -> dict[str, Any]:
    """Return versions, machine and git commit, as they stand in a manifest."""
    names = sorted(d.name for d in importlib.metadata.distributions() if d.name.startswith("effml-"))
    versions = {name: importlib.metadata.version(name) for name in [*names, "torch", "numpy"]}
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [
            line.partition(":")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
        ]
        cpu = models[0].strip() if models else cpu
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip() or None
    except OSError:
        commit = None
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **versions},
        "machine": {
            "system": platform.platform(),
            "cpu": cpu,
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "processes": distributed.world_size(),
        },
        "git": commit,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):  # after the last: cut short by a kill
        try:
            rows.append(json.loads(line))
        except ValueError:
            raise CheckpointError(f"{path}: line {number} is damaged; delete that line to go on without it") from None
    return rows


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
