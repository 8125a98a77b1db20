"""From outcomes to results of `rl.wall`: effects per seed, the table, and what the figures draw.

The control is the fine-tuned policy with its logits multiplied: nothing was learned, and on the scaled grid coverage is
the same sample by sample. On the grid of all others it is the policy's own outcomes at temperatures divided by the
factor. `beyond` is the accuracy that a policy has, in the mean over temperatures, beyond the scaling of the fine-tuned
policy's logits that comes nearest to it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from effml_shared.trainings import half_width
from numpy.typing import NDArray

from effml_rl.experiments.wall_evaluation import PRACTISED, TEST, Evaluation, matrix_file
from effml_rl.wall.correct_matrix import CorrectMatrix
from effml_rl.wall.coverage_wall import WallTest, wall_test
from effml_rl.wall.distillation import temperature_sensitivity
from effml_rl.wall.logit_scaling import fit_scaling, scale_logits
from effml_rl.wall.precision_curves import delta_curve, sorted_precision
from effml_rl.wall.temperature_curves import accuracy, best_over_temperature, coverage

__all__ = ["BEFORE", "CONTROL", "FEW", "MANY", "MORE", "POLICIES", "SETS", "Outcomes", "results"]

BEFORE, CONTROL, MORE, FEW, MANY = "fine-tuned", "control", "more fine-tuning", "GRPO, few", "GRPO, many"
POLICIES = (BEFORE, CONTROL, MORE, FEW, MANY)
TRAINED = (MORE, FEW, MANY)
SETS = (PRACTISED, TEST)
LEFT = 0.4  # of the fall over temperatures, at most, where it was distilled away: an index of 0.6
MARGIN = 5.0  # points by which coverage may change and counts as unchanged
DELTA_AT = 1.0  # temperature of the curves of change, that of training


@dataclass(frozen=True)
class Outcomes:
    """Matrices of one seed on one set of problems, by policy; a training that diverged has none."""

    matrices: Mapping[str, CorrectMatrix]
    whole: CorrectMatrix  # of the fine-tuned policy, at the control's temperatures too
    known: NDArray[np.bool_]  # (problems,): every pair of the right path was often shown in fine-tuning

    @classmethod
    def load(
        cls, directory: Path, config: Evaluation, problems: str, seed: int, trained: Sequence[str], known: NDArray[Any]
    ) -> Outcomes:
        """Read what the sweeps of a seed left."""
        whole = CorrectMatrix.load(matrix_file(directory, BEFORE, problems, seed))
        matrices = {
            BEFORE: _at(whole, config.temperatures),
            CONTROL: scale_logits(_at(whole, config.control_temperatures), config.control),
        }
        matrices |= {name: CorrectMatrix.load(matrix_file(directory, name, problems, seed)) for name in trained}
        return cls(matrices, whole, known)

    def test(self, policy: str) -> WallTest:
        """Compare a policy with the fine-tuned one."""
        return wall_test(self.matrices[BEFORE], self.matrices[policy])

    def falls(self, policy: str) -> tuple[float, float]:
        """Return how far accuracy falls from the lowest temperature to 1, before and after, on problems solved before.

        In points; their quotient is the distillation index's complement.
        """
        before, after = self.matrices[BEFORE], self.matrices[policy]
        solved = np.any(before.correct > 0, axis=0)
        if not solved.any():
            return math.nan, math.nan
        fall, left = (100 * temperature_sensitivity(matrix.select(solved)) for matrix in (before, after))
        return fall, left


def _at(matrix: CorrectMatrix, temperatures: Sequence[float]) -> CorrectMatrix:
    """Return some temperatures of a matrix."""
    rows = [matrix.index(temperature) for temperature in temperatures]
    return CorrectMatrix(matrix.temperatures[rows], matrix.outcomes[rows], problems=matrix.problems)


Seeds = Sequence[Mapping[str, Outcomes] | None]
"""Per seed the outcomes by set of problems; None where fine-tuning diverged."""


def results(seeds: Seeds, measured: Sequence[Mapping[str, Any]], config: Evaluation) -> dict[str, Any]:
    """Return everything for the summary.

    Args:
        measured: per seed and policy what `measure` returned, None after a divergence.
    """
    return {
        "effects": _effects(seeds),
        "table": [_row(seeds, problems, policy, config.temperatures[0]) for problems in SETS for policy in POLICIES],
        "temperatures": config.temperatures,
        "control": config.control,
        "curves": {
            problems: {
                policy: {
                    name: _each(seeds, problems, policy, partial(_curve, curve))
                    for name, curve in (("accuracy", accuracy), ("coverage", coverage))
                }
                for policy in POLICIES
            }
            for problems in SETS
        },
        "sorted": {
            problems: {p: _sorted(seeds, problems, p) for p in (BEFORE, CONTROL, FEW, MANY)} for problems in SETS
        },
        "changes": {problems: {p: _changes(seeds, problems, p) for p in (CONTROL, FEW, MANY)} for problems in SETS},
        "walls": {problems: {p: _each(seeds, problems, p, _wall) for p in (CONTROL, *TRAINED)} for problems in SETS},
        "known": {
            policy: {
                word: _each(seeds, TEST, policy, partial(_split_coverage, known=known))
                for word, known in (("known", True), ("unknown", False))
            }
            for policy in POLICIES
        },
        "known_share": _each(seeds, TEST, BEFORE, lambda of, p: float(of.known.mean())),
        "skills": {
            policy: {
                name: [of.get(policy) and of[policy][name] for of in measured]
                for name in ("plan", "execute", "verify", "shortcuts")
            }
            for policy in (BEFORE, *TRAINED)
        },
    }


def _each(seeds: Seeds, problems: str, policy: str, value: Callable[[Outcomes, str], Any]) -> list[Any]:
    """Return one value per seed, None where the policy or what it came from diverged."""
    return [None if of is None or policy not in of[problems].matrices else value(of[problems], policy) for of in seeds]


def _effects(seeds: Seeds) -> dict[str, list[float | None]]:
    def each(problems: str, policy: str, value: Callable[[Outcomes, str], float]) -> list[float | None]:
        return _each(seeds, problems, policy, value)

    few, many = (each(TEST, policy, _coverage_gain) for policy in (FEW, MANY))
    return {
        "distillation": each(PRACTISED, FEW, _distillation),
        "control": each(PRACTISED, CONTROL, _distillation),
        "accuracy": each(PRACTISED, FEW, _accuracy_gain),
        "practised": each(PRACTISED, FEW, lambda of, policy: MARGIN - abs(_coverage_gain(of, policy))),
        "few": [None if gain is None else MARGIN - gain for gain in few],
        "many": many,
        "difference": [None if m is None or f is None else m - f for m, f in zip(many, few, strict=True)],
    }


def _curve(curve: Callable[[CorrectMatrix], NDArray[np.float64]], of: Outcomes, policy: str) -> list[float]:
    return curve(of.matrices[policy]).tolist()


def _distillation(of: Outcomes, policy: str) -> float:
    """Return by how many points what is left of the fall is less than the share that a distilled policy may have."""
    before, after = of.falls(policy)
    return LEFT * before - after


def _index(falls: Sequence[tuple[float, float] | None]) -> float | None:
    """Return the distillation index of all seeds together: a quotient of means, as single falls may be next to 0."""
    there = [pair for pair in falls if pair is not None and not math.isnan(pair[0])]
    before = sum(pair[0] for pair in there)
    return 1 - sum(pair[1] for pair in there) / before if before > 0 else None


def _coverage_gain(of: Outcomes, policy: str) -> float:
    """Return the change of the best coverage, in points."""
    return 100 * of.test(policy).coverage.delta


def _accuracy_gain(of: Outcomes, policy: str) -> float:
    """Return the change of the best accuracy, in points."""
    return 100 * of.test(policy).precision.delta


def _wall(of: Outcomes, policy: str) -> list[float]:
    """Return the change of the best coverage and the ends of its bootstrap interval, in points."""
    change = of.test(policy).coverage
    return [100 * value for value in (change.delta, change.low, change.high)]


def _beyond(of: Outcomes, policy: str) -> float:
    """Return the mean accuracy that no scaling explains, in points."""
    return 100 * float(fit_scaling(of.whole, of.matrices[policy]).residual.mean())


def _split_coverage(of: Outcomes, policy: str, known: bool) -> float | None:
    """Return the best coverage of the problems whose path is known, or of the others; None if there are none."""
    chosen = of.known if known else ~of.known
    return best_over_temperature(of.matrices[policy].select(chosen), coverage).value if chosen.any() else None


def _row(seeds: Seeds, problems: str, policy: str, low: float) -> dict[str, Any]:
    def mean(value: Callable[[Outcomes, str], float]) -> float | None:
        return _mean(_each(seeds, problems, policy, value))

    trained = policy != BEFORE
    gains = _each(seeds, problems, policy, _coverage_gain)
    known = [gain for gain in gains if gain is not None]
    walls = [hit for hit in _each(seeds, problems, policy, lambda of, p: of.test(p).hits_wall) if hit is not None]
    return {
        "problems": problems,
        "policy": policy,
        "P1* (%)": mean(lambda of, p: 100 * best_over_temperature(of.matrices[p]).value),
        "Cov* (%)": mean(lambda of, p: 100 * best_over_temperature(of.matrices[p], coverage).value),
        "change of Cov*": _mean(gains) if trained else None,
        "± 95%": half_width(known) if trained and known else None,
        "at the wall": f"{sum(walls)} of {len(walls)}" if policy in TRAINED else "",
        f"P1({low:g}) - P1(1)": mean(lambda of, p: 100 * temperature_sensitivity(of.matrices[p])),
        "removed (DI)": _index(_each(seeds, problems, policy, Outcomes.falls)) if trained else None,
        "P1 beyond scaling": mean(_beyond) if policy in TRAINED else None,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.fmean(there) if there and len(there) == len(values) else None


def _sorted(seeds: Seeds, problems: str, policy: str) -> list[list[float]] | None:
    """Return self-sorted precision (temperatures, problems), averaged over seeds rank by rank."""
    found = _each(seeds, problems, policy, lambda of, p: sorted_precision(of.matrices[p]))
    there = [curves for curves in found if curves is not None]
    return np.mean(there, axis=0).round(4).tolist() if there else None


def _changes(seeds: Seeds, problems: str, policy: str) -> dict[str, list[float]] | None:
    """Return what problems gained, in the order of their precision before, averaged over seeds rank by rank."""
    found = _each(seeds, problems, policy, lambda of, p: delta_curve(of.matrices[BEFORE], of.matrices[p], DELTA_AT))
    there = [curve for curve in found if curve is not None]
    if not there:
        return None
    error = np.sqrt(np.mean([curve.error**2 for curve in there], axis=0) / len(there))
    parts = {
        "before": np.mean([c.before for c in there], 0),
        "delta": np.mean([c.delta for c in there], 0),
        "error": error,
    }
    return {name: values.round(4).tolist() for name, values in parts.items()}
