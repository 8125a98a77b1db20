"""Two models on the same questions, task by task: differences, intervals, corrected p-values, wins and losses.

Everything is paired: question ids must be the same on both sides, since a comparison on what two runs happen to share
would depend on where each of them stopped. Differences are first minus second.

Cost: that of the test per task (`paired_tests`).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from effml_shared.checks import check_choice
from effml_shared.errors import ConfigError

from effml_eval.statistics.bootstrap import bootstrap_ci
from effml_eval.statistics.estimate import Estimate
from effml_eval.statistics.paired_tests import (
    bootstrap_test,
    holm,
    mcnemar,
    paired_difference,
    paired_t_test,
    permutation_test,
)
from effml_eval.statistics.scores import Clusters, Vector, score_vector, weight_vector
from effml_eval.statistics.task_means import macro_mean

__all__ = ["ComparisonReport", "TaskComparison", "TaskScores", "compare_scores"]

TaskScores = Mapping[str, Mapping[Any, float]]  # task -> question id -> score

_TIE = 1e-12  # scores that are equal on paper differ by rounding


@dataclass(frozen=True)
class TaskComparison:
    """Two models on the questions of one task.

    Attributes:
        task: its name.
        first: mean score of the first model, or its ratio to the weights.
        second: of the second.
        difference: first - second, with its interval.
        p_value: of no difference.
        p_adjusted: the same, corrected for the number of tasks.
        wins: questions on which the first is better.
        ties: on which they are equal.
        losses: on which the second is better.
    """

    task: str
    first: float
    second: float
    difference: Estimate
    p_value: float
    p_adjusted: float
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True)
class ComparisonReport:
    """A paired comparison of two models.

    Attributes:
        metric: what was compared.
        names: of the two models.
        test: `"paired_t"`, `"mcnemar"`, `"permutation"` or `"bootstrap"`.
        correction: of the p-values for the number of tasks, `"holm"` or `"none"`.
        level: of the intervals.
        tasks: one row each.
    """

    metric: str
    names: tuple[str, str]
    test: str
    correction: str
    level: float
    tasks: tuple[TaskComparison, ...]

    @property
    def macro(self) -> Estimate:
        """The mean difference over tasks, each with the same weight."""
        return macro_mean({row.task: row.difference for row in self.tasks}, self.level)

    def table(self) -> str:
        """Return the comparison as aligned text, one line per task and one for their mean."""
        first, second = self.names
        adjusted = f"p ({self.correction})"
        interval = f"{100 * self.level:g}% interval"
        header = ["task", "n", first, second, "difference", interval, "p", adjusted, "win/tie/loss"]
        rows = [
            [
                row.task,
                str(row.difference.n),
                f"{row.first:.4f}",
                f"{row.second:.4f}",
                *_signed(row.difference),
                f"{row.p_value:.2g}",
                f"{row.p_adjusted:.2g}",
                f"{row.wins}/{row.ties}/{row.losses}",
            ]
            for row in self.tasks
        ]
        if len(self.tasks) > 1:
            macro = self.macro
            rows.append(["macro mean", str(macro.n), "", "", *_signed(macro), "", "", ""])
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in [header, *rows]
        ]
        title = f"{self.metric}: {first} minus {second}, {self.test}"
        return "\n".join([title, *(line.rstrip() for line in lines)])


def compare_scores(
    first: TaskScores,
    second: TaskScores,
    *,
    metric: str = "score",
    names: tuple[str, str] = ("a", "b"),
    test: str = "paired_t",
    correction: str = "holm",
    higher_is_better: bool = True,
    weights: TaskScores | None = None,
    clusters: Mapping[str, Mapping[Any, Hashable]] | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> ComparisonReport:
    """Compare two models' scores per question.

    Args:
        first: scores of the first model, task -> question id -> score.
        second: of the second, of the same tasks and questions.
        metric: what the scores are; for the report.
        names: of the models; for the report.
        test: `"paired_t"`, `"mcnemar"` (0/1 scores, exact), `"permutation"` (sign flips) or `"bootstrap"`. Intervals
            are Student's t, with the last one percentile bootstrap.
        correction: of p-values over tasks, `"holm"` or `"none"`.
        higher_is_better: else a win is a lower score.
        weights: task -> document id -> bytes or the like, for metrics that are ratios of sums: the scores are the
            numerators, such as bits of a document.
        clusters: task -> question id -> label, for tasks whose questions are not independent.
        level: of the intervals.
        seed: of permutation and bootstrap.

    Raises:
        ConfigError: tasks or questions differ, which names those on one side only; a task has fewer than two; or
            McNemar's test is asked for of anything but independent 0/1 scores.

    >>> report = compare_scores({"sums": {0: 1, 1: 1, 2: 0}}, {"sums": {2: 0, 1: 0, 0: 1}}, names=("new", "old"))
    >>> print(report.table())
    score: new minus old, paired_t
    task  n     new     old  difference        95% interval     p  p (holm)  win/tie/loss
    sums  3  0.6667  0.3333     +0.3333  [-1.1009, +1.7676]  0.42      0.42         1/2/0
    """
    check_choice("test", test, ("paired_t", "mcnemar", "permutation", "bootstrap"))
    check_choice("correction", correction, ("holm", "none"))
    _same("tasks", first, second)
    if not first:
        raise ConfigError("tasks: got none, expected at least one")
    measured = []
    for task, questions in first.items():
        _same(f"questions of task {task}", questions, second[task])
        ids = list(questions)
        a = score_vector(f"scores of task {task}", [questions[each] for each in ids])
        b = score_vector(f"scores of task {task}", [second[task][each] for each in ids])
        labels = _chosen("clusters", task, ids, clusters)
        w = weight_vector(f"weights of task {task}", _chosen("weights", task, ids, weights), len(ids))
        d = np.where(np.isclose(a, b, rtol=_TIE, atol=_TIE), 0.0, a - b)
        difference, p = _test(task, a, d, w, test, labels, level, seed)
        wins, losses = (int((sign * d > 0).sum()) for sign in ((1, -1) if higher_is_better else (-1, 1)))
        means = float(a.sum() / w.sum()), float(b.sum() / w.sum())
        measured.append((task, *means, difference, p, wins, len(ids) - wins - losses, losses))
    p_values = [row[4] for row in measured]
    adjusted = holm(p_values) if correction == "holm" else p_values
    rows = tuple(
        TaskComparison(task, a_mean, b_mean, difference, p, corrected, wins, ties, losses)
        for (task, a_mean, b_mean, difference, p, wins, ties, losses), corrected in zip(measured, adjusted, strict=True)
    )
    return ComparisonReport(metric, names, test, correction, level, rows)


def _test(
    task: str, a: Vector, d: Vector, w: Vector, test: str, labels: Clusters | None, level: float, seed: int
) -> tuple[Estimate, float]:
    """Return the difference with its interval, and the p-value."""
    if len(set(range(len(d)) if labels is None else labels)) < 2:
        raise ConfigError(f"task {task}: got one independent question or cluster, expected at least two")
    if test == "bootstrap":
        p = bootstrap_test(d, labels, weights=w, seed=seed)
        return bootstrap_ci(d, w, clusters=labels, level=level, seed=seed), p
    difference = paired_difference(d, labels, weights=w, level=level)
    if test == "permutation":
        return difference, permutation_test(d, labels, seed=seed)
    if test == "mcnemar":
        if labels is not None or not (np.isin(a, (0, 1)).all() and np.isin(d, (-1, 0, 1)).all() and (w == 1).all()):
            raise ConfigError(f"test: got 'mcnemar' for task {task}, whose scores are not 0 or 1 and independent")
        return difference, mcnemar(int((d > 0).sum()), int((d < 0).sum()))
    return difference, paired_t_test(d, labels, weights=w)


def _same(what: str, first: Mapping[Any, Any], second: Mapping[Any, Any]) -> None:
    """Raise a `ConfigError` that names what is on one side only."""
    sides = [[each for each in a if each not in b] for a, b in ((first, second), (second, first))]
    if any(sides):
        found = "; ".join(
            f"{len(only)} only in the {side}: {', '.join(map(str, only[:5]))}{', ...' if len(only) > 5 else ''}"
            for side, only in zip(("first", "second"), sides, strict=True)
            if only
        )
        raise ConfigError(f"{what}: got different ones, {found}; expected the same")


def _chosen(
    what: str, task: str, ids: Sequence[Any], tasks: Mapping[str, Mapping[Any, Any]] | None
) -> list[Any] | None:
    """Return what belongs to each question of a task, None if nothing is given for the task."""
    if tasks is None or task not in tasks:
        return None
    missing = [each for each in ids if each not in tasks[task]]
    if missing:
        raise ConfigError(f"{what} of task {task}: got none for question {missing[0]}, expected one for each")
    return [tasks[task][each] for each in ids]


def _signed(difference: Estimate) -> tuple[str, str]:
    return f"{difference.value:+.4f}", f"[{difference.ci_low:+.4f}, {difference.ci_high:+.4f}]"
