"""Many experiments one after the other, and one page of what they found.

    DIR/NAME/        run directory of the experiment NAME
    DIR/index.html   the page: every claim, the paper's number, ours with its interval, the verdict
    DIR/index.json   the same as data

The run directories are the only state: a finished one is kept, any other continues, a deleted one starts anew. The
page is written whenever an experiment begins, so that it shows all there is at any time.
"""

from __future__ import annotations

import datetime
import json
import re
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effml_shared import distributed
from effml_shared.citations import bibtex
from effml_shared.config import to_yaml
from effml_shared.errors import CheckpointError, ConfigError, EffmlError, Interrupted
from effml_shared.experiments import Experiment, discover, find, one_line
from effml_shared.files import write_whole
from effml_shared.loop import Hook
from effml_shared.report import write_report
from effml_shared.reproduction_page import VERDICTS, reproduction_page
from effml_shared.runs import Run

__all__ = ["Reproduction", "expected_seconds"]


class Reproduction:
    """A directory of runs of one preset, and the page made from them.

    Args:
        out: the directory: new, empty, or of an earlier reproduction with this preset.
        preset: of every experiment.
        names: the experiments to run; none: all that installed packages announce.

    Raises:
        ConfigError: there is no such experiment or preset, or the directory is something else.
    """

    def __init__(self, out: str | Path, preset: str, names: Sequence[str] = ()) -> None:
        self.out, self.preset = Path(out), preset
        known = discover()
        for name in names:
            if name not in known:
                find(name)  # says which one is meant
        if not known:
            raise ConfigError("no experiments: install a package that has some, such as effml-optim")
        self.asked = list(dict.fromkeys(names)) or sorted(known)
        with distributed.agreed("looking at what is there"):  # before any rank writes
            self.names = sorted({*self.asked, *self._present()})
        self._errors: dict[str, str] = {}
        self._experiments: dict[str, Experiment] = {}
        for name in self.names:
            try:
                self._experiments[name] = find(name)
            except ConfigError as error:
                self._errors[name] = one_line(error)
        presets = dict.fromkeys(preset for e in self._experiments.values() for preset in e.presets)
        if presets and preset not in presets:
            raise ConfigError(f"--preset: got {preset!r}, expected one of {', '.join(presets)}")
        self._current: str | None = None
        self._planned = self._spent = 0.0  # seconds of what this session has run from beginning to end

    def unfinished(self) -> list[str]:
        """Return the experiments asked for that still have something to do, in order."""
        return [name for name in self.asked if not (self.entry(name)["status"] == "finished" and self._drawn(name))]

    def run(self, name: str, watch: list[Hook]) -> None:
        """Run or continue one experiment; what goes wrong in it stands on the page and is not raised.

        Raises:
            Interrupted: somebody stopped it; it can be continued.
        """
        self._current = name
        self.write()
        path, begun = self.out / name, time.monotonic()
        fresh = not distributed.from_main((path / "manifest.json").exists())  # one answer for all ranks
        try:
            experiment = self._experiments.get(name)
            if experiment is None:  # cannot be imported, as its error says
                return
            self._errors.pop(name, None)
            if fresh:
                config = experiment.configure(self.preset)
                manifest = {"experiment": name, "preset": self.preset}
                run = Run.create(path, manifest, to_yaml(config), watch=watch)
            else:
                run = Run(path, watch=watch)
                _found(run)  # a damaged one says so before anything is run or drawn
                config = experiment.configure(self.preset, yaml=run.config_yaml)
            if run.summary["status"] != "finished":
                experiment.execute(config, run)
                planned = expected_seconds(experiment.minutes.get(self.preset, ""))
                if fresh and planned:
                    self._planned, self._spent = self._planned + planned, self._spent + time.monotonic() - begun
            if distributed.is_main():
                write_report(run, experiment)
        except Interrupted:
            raise
        except Exception as error:  # whatever it is, the other experiments can still run
            self._errors[name] = one_line(error)
            if not isinstance(error, EffmlError) and path.is_dir() and distributed.is_main():
                write_whole(path / "traceback.txt", traceback.format_exc())
        finally:
            self._current = None

    def seconds_left(self, names: Sequence[str]) -> float | None:
        """Estimate how long experiments take from the times they announce, at the pace seen here; None: no idea."""
        expected = [self.expected(name) for name in names]
        if any(seconds is None for seconds in expected):
            return None
        return sum(seconds for seconds in expected if seconds)

    def expected(self, name: str) -> float | None:
        """Estimate how long one experiment takes."""
        experiment = self._experiments.get(name)
        seconds = expected_seconds(experiment.minutes.get(self.preset, "")) if experiment else 0.0
        return seconds if seconds is None or not self._planned else seconds * self._spent / self._planned

    def entry(self, name: str) -> dict[str, Any]:
        """Return what is known of one experiment, as plain JSON."""
        experiment = self._experiments.get(name)
        entry: dict[str, Any] = {"name": name, "status": "to come", "error": None, "claims": [], "report": None}
        if experiment is not None:
            papers = [
                {"title": p.title, "authors": list(p.authors), "year": p.year, "url": p.url, "bibtex": bibtex(p)}
                for p in experiment.papers
            ]
            entry |= {"title": experiment.title, "paper": experiment.paper, "papers": papers}
            entry["expected"] = experiment.minutes.get(self.preset)
        if (self.out / name / "manifest.json").exists():
            try:
                run = Run(self.out / name)
                entry |= _found(run)
                entry["changed"] = experiment is not None and self._changed(run, experiment)
            except EffmlError as error:
                entry |= {"status": "failed", "error": one_line(error)}
            if entry["status"] == "running":
                entry["status"] = "running" if name == self._current else "interrupted"
            if self._drawn(name):
                entry["report"] = f"{name}/report.html"
        elif name == self._current:
            entry["status"] = "running"
        if name in self._errors:
            entry |= {"status": "failed", "error": self._errors[name]}
        if entry["status"] == "failed" and (self.out / name / "traceback.txt").exists():
            entry["traceback"] = f"{name}/traceback.txt"
        return entry

    def index(self) -> dict[str, Any]:
        """Return everything the page shows, as plain JSON."""
        entries = [self.entry(name) for name in self.names]
        verdicts = [claim["verdict"] for entry in entries for claim in entry["claims"]]
        return {
            "preset": self.preset,
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "running": self._current,
            "counts": {verdict: verdicts.count(verdict) for verdict in VERDICTS},
            "experiments": entries,
        }

    def write(self) -> Path:
        """Write `index.json` and `index.html`; returns the path of the page."""
        index = self.index()
        if distributed.is_main():
            try:
                self.out.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(
                    f"--out {self.out}: cannot write there ({error.strerror}); choose another --out"
                ) from None
            write_whole(self.out / "index.json", json.dumps(index, indent=1))
            write_whole(self.out / "index.html", reproduction_page(index))
        return self.out / "index.html"

    def _present(self) -> list[str]:
        """Return the experiments that the directory already has runs of."""
        if not self.out.exists():
            return []
        if not self.out.is_dir():
            raise ConfigError(f"--out {self.out}: got a file, expected a directory")
        runs = []
        for path in sorted(self.out.iterdir()):
            try:
                manifest = json.loads((path / "manifest.json").read_text())
                ours, preset = manifest["experiment"] == path.name, manifest["preset"]
            except (OSError, ValueError, TypeError, KeyError):
                continue  # no run; a damaged one that is asked for says so in its turn
            if ours and preset != self.preset:
                raise ConfigError(
                    f"--out {self.out}: got runs of preset {preset}, expected {self.preset}; choose another --out"
                )
            runs += [path.name] if ours else []
        if not runs and any(self.out.iterdir()) and not (self.out / "index.json").exists():
            raise ConfigError(f"--out {self.out}: got a place that is in use, expected a new directory")
        return runs

    def _changed(self, run: Run, experiment: Experiment) -> bool:
        """Say whether a run, made by `effml run`, has another configuration than its preset."""
        preset = experiment.configure(self.preset)
        return to_yaml(experiment.configure(self.preset, yaml=run.config_yaml)) != to_yaml(preset)

    def _drawn(self, name: str) -> bool:
        return (self.out / name / "report.html").exists()


def expected_seconds(words: str) -> float | None:
    """Read how long an experiment says it takes; None where it does not know.

    >>> expected_seconds("4 min on one core"), expected_seconds("5 s"), expected_seconds("not measured")
    (240.0, 5.0, None)
    """
    match = re.search(r"(\d+(?:\.\d+)?)\s*(s|min|h)\b", words)
    return float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]] if match else None


def _found(run: Run) -> dict[str, Any]:
    """Return what a run directory says.

    Raises:
        CheckpointError: it says something that no run writes.
    """
    summary, manifest = run.summary, run.manifest
    try:
        claims = [
            {
                **{key: str(verdict["claim"][key]) for key in ("text", "paper", "unit")},
                "at_least": float(verdict["claim"]["at_least"]),
                **{key: _float(verdict[key]) for key in ("mean", "low", "high")},
                "seeds": int(verdict["seeds"]),
                "verdict": VERDICTS[VERDICTS.index(verdict["verdict"])],
            }
            for verdict in summary.get("claims", [])
        ]
        machine = manifest["machine"]
        threads = f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}"
        count = f"{machine['processes']} × " if machine["processes"] > 1 else ""
        return {
            "status": str(summary["status"]),
            "error": str(summary["error"]) if summary.get("error") else None,
            "claims": claims,
            "seconds": _float(summary.get("seconds")),
            "started": str(manifest["started"]),
            "machine": f"{count}{machine['gpu'] or threads}",
            "versions": {str(name): str(version) for name, version in manifest["versions"].items()},
            "git": manifest["git"],
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{run.path}: manifest.json or summary.json is damaged; delete that directory") from None


def _float(value: Any) -> float | None:
    return None if value is None else float(value)
