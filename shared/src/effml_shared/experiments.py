"""Experiments and claims: what a paper says, measured here, judged by a fixed rule.

An experiment runs baseline and method under one budget over several seeds and returns, for every claim, one effect
per seed. The rule: a two-sided 95% confidence interval of the mean effect (Student's t over seeds) that lies wholly on
the claimed side of the claimed size *holds*; wholly on the other side *does not hold*; anything else, and a single
seed, is *inconclusive*. Packages announce experiments through the entry-point group `effml.experiments`.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from effml_shared.citations import Paper
from effml_shared.config import load_config
from effml_shared.errors import ConfigError, EffmlError, Interrupted
from effml_shared.runs import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Claim", "Experiment", "Verdict", "discover", "find", "interval", "judge", "one_line"]


@dataclass(frozen=True)
class Claim:
    """One statement of a paper and the size of effect that counts as it.

    Attributes:
        effect: key of the per-seed numbers among the experiment's effects.
        text: the statement, as the paper has it.
        paper: the paper's own number and setting.
        unit: of the effect, such as `"% fewer steps"`.
        at_least: the claim holds for effects of this size and above.
    """

    effect: str
    text: str
    paper: str
    unit: str
    at_least: float


@dataclass(frozen=True)
class Verdict:
    """A claim as measured: mean over seeds, 95% interval, and `"holds"`, `"does not hold"` or `"inconclusive"`."""

    claim: Claim
    mean: float
    low: float
    high: float
    seeds: int
    verdict: str


@dataclass(frozen=True)
class Experiment:
    """A claim-bearing experiment.

    Attributes:
        name: as in `effml run NAME`, `package.topic`.
        title: the claim in one line.
        paper: citation with arXiv id.
        presets: functions that make a configuration: `smoke` (seconds), `cpu` (the default), `gpu`.
        minutes: how long each preset takes, in words, as measured.
        run: trains everything, returns `{"effects": {name: [one number per seed]}, "table": [row, ...]}` in plain JSON.
        claims: judged on those effects.
        figures: draws the experiment's own plots from the stored metrics and summary.
        papers: what `effml cite` prints.
    """

    name: str
    title: str
    paper: str
    presets: Mapping[str, Callable[[], Any]]
    minutes: Mapping[str, str]
    run: Callable[[Any, Run], dict[str, Any]]
    claims: Sequence[Claim]
    figures: Callable[[list[dict[str, Any]], dict[str, Any]], dict[str, Figure]] = field(
        default=lambda rows, summary: {}
    )
    papers: Sequence[Paper] = ()

    def configure(self, preset: str, *, yaml: Any = None, overrides: Sequence[str] = ()) -> Any:
        """Return the configuration of a preset with overrides."""
        if preset not in self.presets:
            raise ConfigError(f"--preset: got {preset!r}, expected one of {', '.join(self.presets)}")
        return load_config(self.presets[preset](), yaml=yaml, overrides=overrides)

    def execute(self, config: Any, run: Run) -> list[Verdict]:
        """Run, judge, and leave verdicts, status and the seconds of all sessions in the run's summary.

        Whatever stops it is raised again; an error also stands in the summary, in one line.
        """
        begun, before = time.monotonic(), run.summary.get("seconds", 0.0)

        def leave(status: str, **fields: Any) -> None:
            run.update(status=status, seconds=before + time.monotonic() - begun, **fields)

        run.summary.pop("error", None)  # of a session before this one
        run.update(status="running")
        try:
            results = self.run(config, run)
            verdicts = [judge(claim, results["effects"][claim.effect]) for claim in self.claims]
        except (Interrupted, KeyboardInterrupt):
            leave("interrupted")
            raise
        except Exception as error:
            leave("failed", error=one_line(error))
            raise
        leave("finished", claims=[asdict(verdict) for verdict in verdicts], **results)
        return verdicts


def one_line(error: BaseException) -> str:
    """Say an error in one line: ours explain themselves, any other begins with its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, EffmlError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def judge(claim: Claim, effects: Sequence[float | None]) -> Verdict:
    """Apply the rule to one effect per seed.

    An effect of None (the method never got there) leaves the claim inconclusive: dropping it would flatter the rest.

    >>> claim = Claim("saved", "saves 40% of the steps", "40%", "%", at_least=40)
    >>> [judge(claim, e).verdict for e in ([50, 51, 52], [10, 11, 12], [30, 41, 52], [50])]
    ['holds', 'does not hold', 'inconclusive', 'inconclusive']
    """
    values = [value for value in effects if value is not None and math.isfinite(value)]
    if len(values) < len(effects) or not values:
        mean = statistics.fmean(values) if values else math.nan
        return Verdict(claim, mean, math.nan, math.nan, len(values), "inconclusive")
    mean, low, high = interval(values)
    verdict = "holds" if low >= claim.at_least else "does not hold" if high < claim.at_least else "inconclusive"
    return Verdict(claim, mean, low, high, len(values), verdict)


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean and its Student-t confidence interval; a single value has an infinite one.

    Values that are not finite, as of a training that diverged, have no mean (NaN) and an infinite interval too.
    """
    from scipy.stats import t

    if not all(map(math.isfinite, values)):
        return math.nan, -math.inf, math.inf
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = t.ppf(0.5 + level / 2, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def discover() -> dict[str, importlib.metadata.EntryPoint]:
    """Return the announced experiments of all installed packages, by name, not yet imported."""
    return {entry.name: entry for entry in importlib.metadata.entry_points(group="effml.experiments")}


def find(name: str) -> Experiment:
    """Import an experiment by name.

    Raises:
        ConfigError: there is no such experiment; names the nearest.
    """
    known = discover()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]}? (`effml list` shows all)" if near else "install a package that has one"
        raise ConfigError(f"unknown experiment {name!r}: {hint}")
    try:
        return known[name].load()
    except ImportError as error:
        raise ConfigError(f"experiment {name} cannot be imported ({error}): reinstall the package it is in") from error
