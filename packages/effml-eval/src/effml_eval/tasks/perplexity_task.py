"""Texts: how likely each is as a whole. Examples and descriptions have no place before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from effml_shared.errors import ConfigError

from effml_eval.grading.grading import Line
from effml_eval.grading.text_grading import TEXT_METRICS, TextGrading
from effml_eval.scoring.scorer import RollingScore
from effml_eval.tasks.questions import Document
from effml_eval.tasks.task import Asking, Request, Task

__all__ = ["PerplexityTask"]


@dataclass(frozen=True, kw_only=True)
class PerplexityTask(Task[Document]):
    """Predict texts, every document by itself.

    Args:
        metrics: of `TEXT_METRICS`.
    """

    kind: ClassVar[str] = "rolling"
    question_type = Document

    metrics: tuple[str, ...] = TEXT_METRICS

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "metrics", self.grading.metrics)
        if self.shots or self.description:
            raise ConfigError(f"task {self.name}: got shots or a description, expected texts alone")

    @property
    def grading(self) -> TextGrading:
        return TextGrading(tuple(self.metrics))

    def requests(self, question: Document, prefix: str, asking: Asking) -> list[Request]:
        return [question.text]

    def lines(self, question: Document, answers: Sequence[RollingScore]) -> list[Line]:
        (score,) = answers
        sizes = {"n_tokens": [score.n_tokens], "n_bytes": score.n_bytes, "n_words": score.n_words}
        return [{"target": None, "lls": [score.logprob], **sizes}]
