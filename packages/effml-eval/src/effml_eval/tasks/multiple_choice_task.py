"""Multiple choice: the likelihood of each choice behind the question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from effml_shared.errors import ConfigError

from effml_eval.grading.choice_grading import ChoiceGrading
from effml_eval.grading.grading import Line
from effml_eval.scoring.scorer import Score, ScoreRequest
from effml_eval.tasks.questions import ChoiceQuestion
from effml_eval.tasks.task import Asking, Request, Task

__all__ = ["MultipleChoiceTask"]


@dataclass(frozen=True, kw_only=True)
class MultipleChoiceTask(Task[ChoiceQuestion]):
    """Choose among continuations.

    Args:
        metrics: of `CHOICE_METRICS`.
        neutral: a context that says nothing, such as `""` or `"Answer:"`, behind which each choice is scored too;
            for `acc_pmi`, and only then.

    >>> from effml_eval.tasks.questions import choice_question
    >>> task = MultipleChoiceTask(name="sums", questions=[choice_question("1", "1 + 1 =", ["2", "3"], 0)])
    >>> task.requests(task.questions[0], "", Asking())[1]
    ScoreRequest(context='1 + 1 =', continuation=' 3')
    """

    kind: ClassVar[str] = "multiple_choice"
    question_type = ChoiceQuestion

    metrics: tuple[str, ...] = ("acc", "acc_norm")
    neutral: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.neutral is None) == ("acc_pmi" in self.metrics):
            raise ConfigError(f"task {self.name}: got neutral={self.neutral!r}, expected a text with acc_pmi only")
        object.__setattr__(self, "metrics", self.grading.metrics)

    @property
    def grading(self) -> ChoiceGrading:
        return ChoiceGrading(tuple(self.metrics))

    def requests(self, question: ChoiceQuestion, prefix: str, asking: Asking) -> list[Request]:
        asked: list[Request] = [ScoreRequest(prefix + context, text) for context, text in question.pairs]
        if self.neutral is not None:
            asked += [ScoreRequest(self.neutral, continuation) for _, continuation in question.pairs]
        return asked

    def lines(self, question: ChoiceQuestion, answers: Sequence[Score]) -> list[Line]:
        asked = answers[: len(question.choices)]
        line: dict[str, Any] = {
            "target": question.gold,
            "choices": list(question.choices),
            "lls": [score.logprob for score in asked],
            "n_tokens": [score.n_tokens for score in asked],
            "truncated": sum(score.n_truncated > 0 for score in answers),
            "boundary_merges": sum(score.boundary_merge for score in answers),
        }
        if self.neutral is not None:
            line["unconditional"] = [score.logprob for score in answers[len(asked) :]]
        return [line]
