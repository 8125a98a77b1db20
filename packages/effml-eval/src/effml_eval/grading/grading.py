"""From stored answers to scores, estimates and comparisons, without the model: what all kinds of grading have.

A *line* is one sample of one question, a plain JSON object. It is stored with what the model returned and what the
right answer is; a `Grading` adds `scores` (and `extracted`, `correct`), and makes estimates of all lines of a task.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

from effml_shared.checks import check_choice
from effml_shared.errors import ConfigError

from effml_eval.statistics.estimate import Estimate
from effml_eval.statistics.intervals import mean_estimate
from effml_eval.statistics.scores import check_level

__all__ = ["Grading", "Intervals", "Line", "Paired", "by_question", "cluster_labels"]

Line: TypeAlias = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """How sure estimates are.

    Args:
        ci: `"normal"`, `"wilson"`, `"bootstrap"` or `"bca"`; ratios of sums are always bootstrapped.
        level: of the intervals.
        cluster: the tag that questions which are not independent share.
        seed: of a bootstrap.
    """

    ci: str = "normal"
    level: float = 0.95
    cluster: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("ci", self.ci, ("normal", "wilson", "bootstrap", "bca"))
        check_level(self.level)
        if self.ci == "wilson" and self.cluster is not None:
            raise ConfigError("ci: got 'wilson' with clusters, expected 'normal', 'bootstrap' or 'bca'")

    def mean(self, scores: Sequence[float], clusters: Sequence[Hashable] | None) -> Estimate:
        """Estimate the mean of scores, one per question."""
        return mean_estimate(scores, clusters=clusters, ci=self.ci, level=self.level, seed=self.seed)


class Paired(NamedTuple):
    """A metric question by question: the mean of `scores`, or the sum of them over the sum of `weights`."""

    scores: dict[str, float]  # question id -> score
    weights: dict[str, float] | None
    higher_is_better: bool


class Grading(Protocol):
    """Grade the answers of one kind of task."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of what is estimated, the first being the one that stands for the task."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what tells this grading from others, in plain values; `read_grading` makes it of them again."""
        ...

    def check(self, intervals: Intervals, n_samples: int) -> None:
        """Raise a `ConfigError` if a metric cannot be had of so many samples, or not with these intervals."""
        ...

    def grade(self, line: Line) -> Line:
        """Return a line with its scores."""
        ...

    def estimate(self, lines: Sequence[Line], intervals: Intervals) -> dict[str, Estimate]:
        """Return an estimate of each metric from all graded lines of a task."""
        ...

    def paired(self, lines: Sequence[Line], metric: str) -> Paired:
        """Return a metric question by question, for comparisons.

        Raises:
            ConfigError: the metric is none of this grading, or none of single questions.
        """
        ...


def by_question(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Return the lines of each question, samples in order."""
    questions: dict[str, list[Line]] = {}
    for line in sorted(lines, key=lambda line: int(line["sample"])):
        questions.setdefault(line["doc_id"], []).append(line)
    return {id: questions[id] for id in dict.fromkeys(line["doc_id"] for line in lines)}


def cluster_labels(questions: Mapping[str, Sequence[Line]], cluster: str | None) -> list[str] | None:
    """Return the tag of each question.

    Raises:
        ConfigError: a question has none of that name.
    """
    if cluster is None:
        return None
    for id, lines in questions.items():
        if cluster not in lines[0]["tags"]:
            known = ", ".join(lines[0]["tags"]) or "none"
            raise ConfigError(f"cluster: got {cluster!r}, expected a tag of question {id} (it has {known})")
    return [str(lines[0]["tags"][cluster]) for lines in questions.values()]
