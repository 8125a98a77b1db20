"""Two evaluations, question by question: the pairing of stored samples for `statistics.comparison`."""

from __future__ import annotations

from pathlib import Path

from effml_shared.errors import ConfigError

from effml_eval.evaluation.eval_result import EvalResult
from effml_eval.statistics.comparison import ComparisonReport, compare_scores

__all__ = ["compare"]


def compare(
    first: EvalResult | str | Path,
    second: EvalResult | str | Path,
    metric: str | None = None,
    test: str = "paired_t",
    correction: str = "holm",
    *,
    names: tuple[str, str] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> ComparisonReport:
    """Compare two evaluations of the same tasks on the same questions.

    Args:
        first: of `evaluate`, or a directory with results.
        second: likewise; differences are first minus second.
        metric: None: of each task its first one, of texts bits per byte.
        test: `"paired_t"`, `"mcnemar"`, `"permutation"` or `"bootstrap"`.
        correction: of p-values over tasks, `"holm"` or `"none"`.
        names: of the two in the report; None: of their models.
        level: of the intervals.
        seed: of permutation and bootstrap.

    Raises:
        ConfigError: tasks or questions differ (names them), or a task has no such metric of single questions.
        CheckpointError: a directory holds no finished evaluation.
    """
    results = [result if isinstance(result, EvalResult) else EvalResult.load(result) for result in (first, second)]
    a, b = results
    if different := sorted(set(a.lines) ^ set(b.lines)):
        raise ConfigError(f"tasks: got {', '.join(different)} on one side only, expected the same on both")
    scores: list[dict[str, dict[str, float]]] = [{}, {}]
    weights: dict[str, dict[str, float]] = {}
    chosen: dict[str, bool] = {}
    for task in a.lines:
        name = metric or _standing_for(a, task)
        pairs = [result.grading(task).paired(result.lines[task], name) for result in results]
        for side, pair in zip(scores, pairs, strict=True):
            side[task] = pair.scores
        if pairs[0].scores.keys() == pairs[1].scores.keys():
            _check_content(a, b, task)
        if pairs[0].weights is not None:
            weights[task] = pairs[0].weights
        chosen[name] = pairs[0].higher_is_better
    if len(set(chosen.values())) > 1:
        raise ConfigError(f"metric: got {', '.join(chosen)}, of which more is better or worse; expected one metric")
    return compare_scores(
        *scores,
        metric=", ".join(chosen),
        names=names or (a.record["model"]["id"], b.record["model"]["id"]),
        test=test,
        correction=correction,
        higher_is_better=all(chosen.values()),
        weights=weights,
        clusters=_clusters(a),
        level=level,
        seed=seed,
    )


def _standing_for(result: EvalResult, task: str) -> str:
    if result.record["tasks"][task]["kind"] == "rolling":
        return "bits_per_byte"
    return result.grading(task).metrics[0]


def _check_content(a: EvalResult, b: EvalResult, task: str) -> None:
    """Raise a `ConfigError` if equal ids do not mean equal questions."""
    for field, what in (("questions_sha256", "other questions under the same ids"), ("version", "another version")):
        if a.record["tasks"][task][field] != b.record["tasks"][task][field]:
            raise ConfigError(f"task {task}: got {what} on the two sides, expected the same questions")


def _clusters(result: EvalResult) -> dict[str, dict[str, str]] | None:
    cluster = result.record["config"]["cluster"]
    if cluster is None:
        return None
    return {task: {line["doc_id"]: line["tags"][cluster] for line in lines} for task, lines in result.lines.items()}
