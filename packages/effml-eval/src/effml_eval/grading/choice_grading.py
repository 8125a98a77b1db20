"""Grade multiple choice: accuracies under several normalisations, and how good the probabilities are.

A line holds `lls` and `n_tokens` of each choice, `choices`, `target` (the right index), and `unconditional` if it was
asked for. `metrics.multiple_choice` defines the scores; `ece` is over all questions of a task and has no interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effml_shared.checks import check_choice
from effml_shared.errors import ConfigError

from effml_eval.grading.grading import Intervals, Line, Paired, by_question, cluster_labels
from effml_eval.metrics.multiple_choice import expected_calibration_error, multiple_choice_scores
from effml_eval.statistics.estimate import Estimate

__all__ = ["CHOICE_METRICS", "ChoiceGrading"]

_ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_token", "acc_pmi")
_SMALLER_IS_BETTER = ("brier", "nll")
CHOICE_METRICS = (*_ACCURACIES, "prob", *_SMALLER_IS_BETTER, "ece")


@dataclass(frozen=True)
class ChoiceGrading:
    """Grade multiple choice by some of `CHOICE_METRICS`."""

    metrics: tuple[str, ...] = ("acc", "acc_norm")

    def __post_init__(self) -> None:
        for metric in self.metrics:
            check_choice("metrics", metric, CHOICE_METRICS)

    def describe(self) -> dict[str, Any]:
        return {"kind": "multiple_choice", "metrics": list(self.metrics)}

    def check(self, intervals: Intervals, n_samples: int) -> None:
        others = [metric for metric in self.metrics if metric not in (*_ACCURACIES, "ece")]
        if intervals.ci == "wilson" and others:
            raise ConfigError(f"ci: got 'wilson' for {', '.join(others)}, expected metrics that are 0 or 1")

    def grade(self, line: Line) -> Line:
        scores = multiple_choice_scores(
            [float(ll) for ll in line["lls"]],
            line["target"],
            choices=line["choices"],
            tokens=line["n_tokens"],
            unconditional=[float(ll) for ll in line["unconditional"]] if "unconditional" in line else None,
        )
        missing = [metric for metric in self.metrics if metric not in (*scores, "ece")]
        if missing:
            expected = "a task that has a neutral context, without which nothing is known of the choices alone"
            raise ConfigError(f"metrics: got {', '.join(missing)}, expected {expected}")
        return {**line, "correct": scores["acc"], "scores": scores}

    def estimate(self, lines: Sequence[Line], intervals: Intervals) -> dict[str, Estimate]:
        labels = cluster_labels(by_question(lines), intervals.cluster)
        estimates = {}
        for metric in self.metrics:
            if metric == "ece":
                value = expected_calibration_error(_column(lines, "confidence"), _column(lines, "acc"))
                estimates[metric] = Estimate(value, math.nan, -math.inf, math.inf, len(lines), "no interval")
            else:
                estimates[metric] = intervals.mean(_column(lines, metric), labels)
        return estimates

    def paired(self, lines: Sequence[Line], metric: str) -> Paired:
        check_choice("metric", metric, CHOICE_METRICS[:-1])
        scores: Mapping[str, float] = {line["doc_id"]: line["scores"].get(metric) for line in lines}
        if None in scores.values():
            raise ConfigError(f"metric: got {metric!r}, expected one of {', '.join(lines[0]['scores'])}")
        return Paired(dict(scores), None, metric not in _SMALLER_IS_BETTER)


def _column(lines: Sequence[Line], name: str) -> list[float]:
    return [float(line["scores"][name]) for line in lines]
