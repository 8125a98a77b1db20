from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from effml_eval.evaluation.eval_result import EvalResult
from effml_eval.evaluation.evaluator import evaluate
from effml_eval.evaluation.result_comparison import compare
from effml_eval.scoring import Generation, GenerationRequest, RollingScore, Score
from effml_eval.tasks import Document, MultipleChoiceTask, PerplexityTask, choice_question
from effml_shared.errors import ConfigError


class Biased:
    """A scorer that prefers continuations with a letter, and finds documents as likely as it is told."""

    def __init__(self, letter: str, nats: float = 1.0) -> None:
        self.letter, self.nats = letter, nats

    def score(self, requests: Sequence[tuple[str, str]]) -> list[Score]:
        return [Score(float(text.count(self.letter)) - 9, False, 1) for _, text in requests]

    def rolling(self, documents: Sequence[str]) -> list[RollingScore]:
        return [RollingScore(-self.nats * len(text), len(text), len(text), 1) for text in documents]

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        raise NotImplementedError


def quiz(n: int = 6, gold: int = 1, **options: Any) -> MultipleChoiceTask:
    questions = [choice_question(str(i), f"{i}?", ["b", "a"], gold if i < 5 else 0) for i in range(n)]
    return MultipleChoiceTask(**{"name": "quiz", "questions": questions, **options})


def texts() -> PerplexityTask:
    return PerplexityTask(name="texts", questions=[Document(id=str(i), text="x" * i) for i in range(4)])


def test_question_by_question(tmp_path: Path) -> None:
    first = evaluate(Biased("a"), quiz(), model_id="new")
    evaluate(Biased("b"), quiz(), model_id="old", out_dir=tmp_path)
    report = compare(first, tmp_path, test="mcnemar")
    (row,) = report.tasks
    assert (report.names, report.metric) == (("new", "old"), "acc")
    assert (row.wins, row.ties, row.losses) == (5, 0, 1)
    assert row.difference.value == pytest.approx(4 / 6)
    assert row.p_value == pytest.approx(14 / 64)  # two-sided binomial: 1, 6 and their mirror images of 64
    assert compare(first, first, metric="brier").tasks[0].ties == 6


def test_bits_per_byte_are_ratios_of_sums() -> None:
    first, second = (evaluate(Biased("a", nats), texts()) for nats in (1.0, 2.0))
    (row,) = compare(first, second).tasks
    assert row.first == pytest.approx(first.metrics["texts"]["bits_per_byte"].value)
    assert row.second == pytest.approx(2 * row.first)
    assert (row.wins, row.losses, row.difference.n) == (3, 0, 3)  # fewer bits are better; the empty text says nothing


def test_what_cannot_be_compared() -> None:
    whole = evaluate(Biased("a"), quiz())
    refused: list[tuple[EvalResult, dict[str, Any], str]] = [
        (
            evaluate(Biased("a"), quiz(), limit=4),
            {},
            r"questions of task quiz: got different ones, 2 only in the first: 4, 5",
        ),
        (evaluate(Biased("a"), quiz(gold=0)), {}, r"task quiz: got other questions under the same ids"),
        (evaluate(Biased("a"), quiz(version=2)), {}, r"task quiz: got another version"),
        (evaluate(Biased("a"), texts()), {}, r"tasks: got quiz, texts on one side only"),
        (whole, {"metric": "bits_per_byte"}, r"metric: got 'bits_per_byte'"),
    ]
    for other, options, message in refused:
        with pytest.raises(ConfigError, match=message):
            compare(whole, other, **options)
    both = evaluate(Biased("a"), [quiz(), texts()])
    with pytest.raises(ConfigError, match=r"metric: got acc, bits_per_byte, of which more is better or worse"):
        compare(both, both)
