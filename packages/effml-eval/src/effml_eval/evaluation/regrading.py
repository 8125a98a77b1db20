"""Other metrics, another way to find answers or other intervals, from stored samples and without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from effml_shared.errors import ConfigError

from effml_eval.evaluation.eval_result import EvalResult, graded_result
from effml_eval.grading import AnswerGrading, Grading, Intervals
from effml_eval.metrics.extraction import Extractor

__all__ = ["recompute"]


def recompute(
    result: EvalResult | str | Path,
    metrics: Sequence[str] | None = None,
    extractor: str | Extractor | None = None,
    *,
    equal: str | None = None,
    ci: str | None = None,
    level: float | None = None,
    cluster: str | None = None,
    seed: int | None = None,
) -> EvalResult:
    """Grade the samples of an evaluation anew; what is None stays as it was. Nothing on disk is changed.

    Args:
        result: of `evaluate`, or the directory that it was saved in.
        metrics: each goes to the tasks that have it.
        extractor: finds the answer in what the model wrote.
        equal: compares it with the right ones.
        ci: see `evaluate`; so are level and cluster.
        seed: of a bootstrap.

    Raises:
        ConfigError: a metric is none of any task, or cannot be had of the samples that there are.
        CheckpointError: the directory holds no finished evaluation.
    """
    if not isinstance(result, EvalResult):
        result = EvalResult.load(result)
    config = result.record["config"]
    intervals = Intervals(
        ci=config["ci"] if ci is None else ci,
        level=config["level"] if level is None else level,
        cluster=config["cluster"] if cluster is None else cluster,
        seed=result.record["seeds"]["base"] if seed is None else seed,
    )
    gradings = {task: _changed(result.grading(task), metrics, extractor, equal) for task in result.lines}
    if metrics is not None:
        had = {metric for grading in gradings.values() for metric in grading.metrics}
        if unknown := [metric for metric in metrics if metric not in had]:
            raise ConfigError(f"metrics: got {', '.join(unknown)}, expected some that {', '.join(gradings)} have")
    for task, grading in gradings.items():
        grading.check(intervals, 1 + max(line["sample"] for line in result.lines[task]))
    changed = {"ci": intervals.ci, "level": intervals.level, "cluster": intervals.cluster}
    record = {**result.record, "config": {**config, **changed}}
    return graded_result(result.lines, gradings, record, intervals)


def _changed(
    grading: Grading, metrics: Sequence[str] | None, extractor: str | Extractor | None, equal: str | None
) -> Grading:
    """Return a grading with those of the changes that concern it."""
    changes: dict[str, Any] = {}
    if isinstance(grading, AnswerGrading):
        changes = {"extractor": extractor, "equal": equal}
        changes = {name: value for name, value in changes.items() if value is not None}
    own = tuple(metric for metric in metrics or () if _has(grading, metric))
    if own:
        changes["metrics"] = own
    chosen: Any = grading
    return replace(chosen, **changes)


def _has(grading: Grading, metric: str) -> bool:
    chosen: Any = grading
    try:
        replace(chosen, metrics=(metric,))
    except ConfigError:
        return False
    return True
