"""Grade what a model wrote: find the answer, compare it with the right ones, and account for several samples.

A line holds `output`, `finish_reason`, and `target`, the list of right answers. Of each question the samples' answers
and their correctness enter

    exact_match   share of correct samples (avg@n)         pass@K, pass^K, maj@K   of any, all, the majority of K
    g-pass@K_TAU  of at least the share TAU of K

each an unbiased estimate from n >= K samples (`metrics.n_sample`, `metrics.majority`). A sample without an answer is
wrong and does not vote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from effml_shared.checks import check_choice
from effml_shared.errors import ConfigError

from effml_eval.grading.grading import Intervals, Line, Paired, by_question, cluster_labels
from effml_eval.metrics.equivalence import exact_equal, is_correct, normalized_equal, numeric_equal
from effml_eval.metrics.extraction import EXTRACTORS, Extractor, extractor, regex_extractor
from effml_eval.metrics.formulas import symbolic_equal
from effml_eval.metrics.majority import maj_at_k
from effml_eval.metrics.n_sample import g_pass_at_k, pass_all_at_k, pass_at_k
from effml_eval.statistics.estimate import Estimate

__all__ = ["EQUIVALENCES", "AnswerGrading", "find_extractor"]

EQUIVALENCES: dict[str, Callable[[Any, Any], bool]] = {
    "exact": exact_equal,
    "normalized": normalized_equal,
    "numeric": numeric_equal,
    "symbolic": symbolic_equal,
}
_METRIC = re.compile(r"exact_match|(pass@|pass\^|maj@)([1-9]\d*)|g-pass@([1-9]\d*)_(0?\.\d+|1(?:\.0*)?|0)")
_WHOLE = Extractor("whole", 1, str.strip)


def find_extractor(name: str | Extractor) -> Extractor:
    """Return an extractor by the name that results record or that `metrics.extraction` knows, or the whole text.

    >>> str(find_extractor("boxed")), str(find_extractor("whole@1")), str(find_extractor("regex:first:a(b)@1"))
    ('boxed@1', 'whole@1', 'regex:first:a(b)@1')

    Raises:
        ConfigError: the name is unknown, or of another version than is here.
    """
    if isinstance(name, Extractor):
        return name
    recorded = re.fullmatch(r"regex:(first|last):(.*)@(\d+)", name, re.DOTALL)
    if recorded:
        return regex_extractor(recorded[2], recorded[1], version=int(recorded[3]))
    if name.startswith("regex:"):
        return extractor(name)
    plain, at, version = name.partition("@")
    check_choice("extractor", plain, [_WHOLE.name, *EXTRACTORS])
    found = _WHOLE if plain == _WHOLE.name else EXTRACTORS[plain]
    if at and version != str(found.version):
        raise ConfigError(f"extractor: got {name!r}, expected version {found.version}, the only one that is here")
    return found


@dataclass(frozen=True)
class AnswerGrading:
    """Grade written answers.

    Args:
        metrics: as above.
        extractor: finds the answer; `find_extractor` knows the names.
        equal: one of `EQUIVALENCES`.
    """

    metrics: tuple[str, ...] = ("exact_match",)
    extractor: str | Extractor = "whole"
    equal: str = "exact"

    def __post_init__(self) -> None:
        for metric in self.metrics:
            if _METRIC.fullmatch(metric) is None:
                expected = "exact_match, pass@K, pass^K, maj@K or g-pass@K_TAU with numbers for K and TAU"
                raise ConfigError(f"metrics: got {metric!r}, expected {expected}")
        find_extractor(self.extractor)
        check_choice("equal", self.equal, EQUIVALENCES)

    def describe(self) -> dict[str, Any]:
        rules = {"extractor": str(find_extractor(self.extractor)), "equal": self.equal}
        return {"kind": "generate", "metrics": list(self.metrics), **rules}

    def check(self, intervals: Intervals, n_samples: int) -> None:
        for metric in self.metrics:
            if _most(metric) > n_samples:
                raise ConfigError(f"metrics: got {metric} of {n_samples} samples, expected n_samples of at least K")
        if intervals.ci == "wilson" and n_samples > 1:
            raise ConfigError(f"ci: got 'wilson' for means of {n_samples} samples, expected one sample per question")

    def grade(self, line: Line) -> Line:
        answer = find_extractor(self.extractor)(line["output"])
        correct = is_correct(answer, line["target"], EQUIVALENCES[self.equal])
        return {**line, "extracted": answer, "correct": int(correct), "scores": {"exact_match": float(correct)}}

    def estimate(self, lines: Sequence[Line], intervals: Intervals) -> dict[str, Estimate]:
        questions = by_question(lines)
        labels = cluster_labels(questions, intervals.cluster)
        return {
            metric: intervals.mean([self._score(metric, samples) for samples in questions.values()], labels)
            for metric in self.metrics
        }

    def paired(self, lines: Sequence[Line], metric: str) -> Paired:
        asked = AnswerGrading((metric,), self.extractor, self.equal)
        questions = by_question(lines)
        asked.check(Intervals(), min(map(len, questions.values())))
        return Paired({id: self._score(metric, samples) for id, samples in questions.items()}, None, True)

    def _score(self, metric: str, samples: Sequence[Line]) -> float:
        """Return the metric of one question."""
        correct, k = [line["correct"] for line in samples], _most(metric)
        if metric == "exact_match":
            return sum(correct) / len(correct)
        if metric.startswith("maj@"):
            answers = [line["extracted"] for line in samples]
            return maj_at_k(answers, samples[0]["target"], k, equal=EQUIVALENCES[self.equal])
        if metric.startswith("g-pass@"):
            return float(g_pass_at_k(len(correct), [sum(correct)], k, float(metric.rpartition("_")[2]))[0])
        estimate = pass_at_k if metric.startswith("pass@") else pass_all_at_k
        return float(estimate(len(correct), [sum(correct)], k)[0])


def _most(metric: str) -> int:
    """Return how many samples a metric needs."""
    found = _METRIC.fullmatch(metric)
    return int(found[2] or found[3] or 1) if found else 1
