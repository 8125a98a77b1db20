"""The directory of a sweep.

    DIR/POINT/              run directory of a point, such as `lr=0.01,model.width=64`
    DIR/points/POINT.yaml   its configuration
    DIR/sweep.json          experiment, preset, grid, points, where their jobs are, versions
    DIR/jobs/               what submitit writes, logs among it

Whether a point is finished stands in its run directory and nowhere else: a finished one is kept, any other continues,
a deleted one starts anew. A grid may grow; what a point computes never changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effml_shared.config import to_yaml
from effml_shared.errors import CheckpointError, ConfigError, EffmlError
from effml_shared.experiments import Experiment
from effml_shared.files import write_whole
from effml_shared.runs import Run, describe_machine
from effml_shared.sweeps.grid import grid_points

__all__ = ["Sweep", "is_sweep"]


def is_sweep(path: str | Path) -> bool:
    """Say whether a directory is one of a sweep."""
    return (Path(path) / "sweep.json").is_file()


class Sweep:
    """An existing sweep; `create` makes one, `Sweep(path)` opens one.

    Attributes:
        experiment, preset: of every point.
        grid: the values of every varied field, as they were written.
        points: in the order of the grid.
        jobs: what is known of where they run: executor, its options, and the job of each point.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            about = json.loads((self.path / "sweep.json").read_text(encoding="utf-8"))
            self.experiment, self.preset = str(about["experiment"]), str(about["preset"])
            self.overrides: list[str] = list(about["overrides"])
            self.grid = {str(field): [str(value) for value in values] for field, values in about["grid"].items()}
            self.jobs = _jobs(about["jobs"])
            self.versions: dict[str, str] = dict(about["versions"])
            self.points = grid_points(self.grid)
            if not self.points or not self.grid or [point.name for point in self.points] != about["points"]:
                raise ValueError("other points than those of its grid")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "sweep.json is damaged"
            raise CheckpointError(
                f"{path}: got no readable sweep ({reason}), expected a directory that `effml sweep` made"
            ) from None

    @classmethod
    def create(
        cls,
        path: str | Path,
        experiment: Experiment,
        preset: str,
        grid: Mapping[str, Sequence[str]],
        *,
        yaml: str | None = None,
        overrides: Sequence[str] = (),
    ) -> Sweep:
        """Make a sweep, or open the one that is there, adding to it what is new in the grid.

        Every point's configuration is checked before anything is written.

        Args:
            path: directory, new or of a sweep whose points are all among these.
            yaml: file of fields, laid over the preset of every point.
            overrides: `field=value` words, the same at every point.

        Raises:
            ConfigError: a point's configuration is wrong, two are the same, or the directory holds something else.
        """
        path = Path(path)
        if not grid or not all(grid.values()):
            raise ConfigError("--grid: got no values, expected a field and its values")
        configs = _configurations(experiment, preset, grid, yaml, overrides)
        about = {"experiment": experiment.name, "preset": preset, "overrides": list(overrides), "grid": dict(grid)}
        jobs: dict[str, Any] = {}
        if is_sweep(path):
            there = cls(path)
            there._check_extends(experiment, preset, configs)
            jobs = there.jobs
        elif path.exists() and (not path.is_dir() or {file.name for file in path.iterdir()} - {"points"}):
            raise ConfigError(f"--out {path}: got a place that is in use, expected a new directory or one of a sweep")
        try:
            (path / "points").mkdir(parents=True, exist_ok=True)
            for name, config in configs.items():
                write_whole(path / "points" / f"{name}.yaml", config)
            versions = describe_machine()["versions"]
            about |= {"points": list(configs), "jobs": jobs, "versions": versions}
            write_whole(path / "sweep.json", json.dumps(about, indent=1))
        except OSError as error:
            raise CheckpointError(
                f"--out {path}: cannot write there ({error.strerror}); choose another --out"
            ) from None
        return cls(path)

    def _check_extends(self, experiment: Experiment, preset: str, configs: Mapping[str, str]) -> None:
        """Refuse what would change a point that is there, or leave it out."""
        hint = f"`effml resume {self.path}` continues it, or choose another --out"
        for what, here, asked in (
            ("experiment", self.experiment, experiment.name),
            ("preset", self.preset, preset),
        ):
            if here != asked:
                raise ConfigError(f"--out {self.path}: got a sweep of {what} {here}, expected {asked}; {hint}")
        for point in self.points:
            if point.name not in configs:
                raise ConfigError(
                    f"--out {self.path}: got a sweep with the point {point.name}, expected one within this grid; {hint}"
                )
            here = to_yaml(experiment.configure(preset, yaml=self.config(point.name)))
            if here != configs[point.name]:
                raise ConfigError(f"--out {self.path}: got a sweep with another configuration at {point.name}; {hint}")

    def directory(self, name: str) -> Path:
        """Return the run directory of a point."""
        return self.path / name

    def config(self, name: str) -> Path:
        """Return the file of a point's configuration."""
        return self.path / "points" / f"{name}.yaml"

    def varied(self) -> list[str]:
        """Return the fields that differ between points; the only point of a grid is named by all of its fields."""
        return [field for field, values in self.grid.items() if len(values) > 1] or list(self.grid)

    def begun(self, name: str) -> Run | None:
        """Open the run of a point; None: there is none yet.

        Raises:
            CheckpointError: it is damaged.
        """
        return Run(self.directory(name)) if (self.directory(name) / "manifest.json").exists() else None

    def status(self, name: str) -> str:
        """Return `"to come"`, or what the point's run says: `"running"`, `"interrupted"`, `"failed"`, `"finished"`."""
        try:
            run = self.begun(name)
        except EffmlError:
            return "failed"
        return "to come" if run is None else str(run.summary["status"])

    def outcome(self, name: str) -> str:
        """Return the status of a point that no job works on: what runs was interrupted, what is to come never began."""
        status = self.status(name)
        return {"running": "interrupted", "to come": "not begun"}.get(status, status)

    def unfinished(self) -> list[str]:
        """Return the points that still have something to do, in order."""
        return [point.name for point in self.points if self.status(point.name) != "finished"]

    def record(self, **jobs: Any) -> None:
        """Remember where the points run."""
        about = json.loads((self.path / "sweep.json").read_text(encoding="utf-8"))
        self.jobs |= jobs
        write_whole(self.path / "sweep.json", json.dumps({**about, "jobs": self.jobs}, indent=1))


def _jobs(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of the jobs, with every kind of thing that must be known."""
    jobs: dict[str, Any] = {"executor": "local", "at_once": None, "slurm": [], "ids": {}} | dict(about)
    right = jobs["executor"] in ("local", "slurm") and isinstance(jobs["at_once"], int | None)
    if not right or not all(isinstance(word, str) for word in [*jobs["slurm"], *jobs["ids"].values()]):
        raise ValueError("something else than jobs")
    return jobs


def _configurations(
    experiment: Experiment, preset: str, grid: Mapping[str, Sequence[str]], yaml: str | None, overrides: Sequence[str]
) -> dict[str, str]:
    """Return the configuration of every point as YAML, by its name."""
    for field in (word.partition("=")[0] for word in overrides):
        for varied in grid:
            if f"{varied}.".startswith(f"{field}.") or f"{field}.".startswith(f"{varied}."):
                raise ConfigError(f"{varied}: got it both in --grid and as {field}=VALUE, expected one of them")
    configs: dict[str, str] = {}
    for point in grid_points(grid):
        words = [*overrides, *(f"{field}={value}" for field, value in point.values.items())]
        try:
            config = to_yaml(experiment.configure(preset, yaml=yaml, overrides=words))
        except ConfigError as error:
            raise ConfigError(f"point {point.name}: {error}") from None
        same = [name for name, other in configs.items() if other == config]
        if same:
            raise ConfigError(f"--grid: got {same[0]} and {point.name}, which are the same configuration")
        configs[point.name] = config
    return configs
