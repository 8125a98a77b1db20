"""Open questions: what the model writes, once or several times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from effml_eval.grading.answer_grading import AnswerGrading
from effml_eval.grading.grading import Line
from effml_eval.metrics.extraction import Extractor
from effml_eval.scoring.scorer import Generation, GenerationRequest, SamplingParams
from effml_eval.tasks.questions import OpenQuestion
from effml_eval.tasks.task import Asking, Request, Task

__all__ = ["GenerativeTask"]


@dataclass(frozen=True, kw_only=True)
class GenerativeTask(Task[OpenQuestion]):
    """Let the model write.

    Args:
        metrics: see `AnswerGrading`.
        extractor: finds the answer in what was written.
        equal: compares it with the right ones.
        sampling: of the task; where an evaluation has its own, only the stop strings of the task are kept.
    """

    kind: ClassVar[str] = "generate"
    question_type = OpenQuestion

    metrics: tuple[str, ...] = ("exact_match",)
    extractor: str | Extractor = "whole"
    equal: str = "exact"
    sampling: SamplingParams = field(default_factory=SamplingParams)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "metrics", self.grading.metrics)

    @property
    def grading(self) -> AnswerGrading:
        return AnswerGrading(tuple(self.metrics), self.extractor, self.equal)

    def requests(self, question: OpenQuestion, prefix: str, asking: Asking) -> list[Request]:
        sampling, prompt = self.sampling, prefix + question.prompt
        if asking.sampling is not None:
            sampling = replace(asking.sampling, stop=(*asking.sampling.stop, *sampling.stop))
        return [GenerationRequest(prompt, sampling, sample, asking.seed) for sample in range(asking.n_samples)]

    def lines(self, question: OpenQuestion, answers: Sequence[Generation]) -> list[Line]:
        return [
            {
                "target": list(question.golds),
                "output": generation.text,
                "n_tokens": generation.n_tokens,
                "finish_reason": generation.finish_reason,
                "truncated": int(generation.n_truncated > 0),
            }
            for generation in answers
        ]
