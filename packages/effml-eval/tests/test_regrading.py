from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from effml_eval.evaluation.eval_result import EvalResult
from effml_eval.evaluation.evaluator import evaluate
from effml_eval.evaluation.regrading import recompute
from effml_eval.scoring import Generation, GenerationRequest, RollingScore, SamplingParams, Score
from effml_eval.tasks import GenerativeTask, MultipleChoiceTask, OpenQuestion, choice_question
from effml_shared.errors import CheckpointError, ConfigError


class Fixed:
    """A scorer that likes short continuations, and writes numbers of which some are right."""

    def score(self, requests: Sequence[tuple[str, str]]) -> list[Score]:
        return [Score(-float(len(text)), False, len(text)) for _, text in requests]

    def rolling(self, documents: Sequence[str]) -> list[RollingScore]:
        raise NotImplementedError

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        return [Generation(f"{request.sample % 2}, so 2.0", "eos", 4) for request in requests]


@pytest.fixture
def result() -> EvalResult:
    open_questions = [OpenQuestion(id=str(i), prompt=f"{i}?", golds=(str(i),), tags={"book": "x"}) for i in range(3)]
    sampling = SamplingParams(temperature=1.0)
    choices = [choice_question(str(i), f"{i}?", ["one", "three"], i % 2, tags={"book": str(i // 2)}) for i in range(4)]
    tasks: list[Any] = [
        GenerativeTask(name="numbers", questions=open_questions, sampling=sampling),
        MultipleChoiceTask(name="quiz", questions=choices),
    ]
    return evaluate(Fixed(), tasks, n_samples=4)


def test_other_metrics_and_extractors(result: EvalResult, tmp_path: Path) -> None:
    assert result.metrics["numbers"]["exact_match"].value == 0
    found = recompute(result, ["exact_match", "pass@2", "nll"], r"regex:first:^(\d)@1")
    assert found.metrics["numbers"]["exact_match"].value == pytest.approx(1 / 3)  # half of each of 0 and 1
    assert found.metrics["numbers"]["pass@2"].value == pytest.approx((5 / 6 + 5 / 6) / 3)
    assert list(found.metrics["quiz"]) == ["nll"]
    assert found.record["tasks"]["numbers"]["grading"]["extractor"] == r"regex:first:^(\d)@1"
    result.save(tmp_path)
    found = recompute(tmp_path, extractor="last_number", equal="numeric")
    assert found.metrics["numbers"]["exact_match"].value == pytest.approx(1 / 3)
    assert list(found.metrics["quiz"]) == ["acc", "acc_norm"]
    assert EvalResult.load(tmp_path).record == result.record  # as before
    assert recompute(result).record == result.record


def test_other_intervals(result: EvalResult) -> None:
    found = recompute(result, ["acc"], ci="bootstrap", cluster="book", level=0.9)
    assert found.metrics["quiz"]["acc"].method == "bootstrap percentile, clustered"
    assert found.record["config"]["level"] == 0.9
    assert result.metrics["quiz"]["acc"].method == "normal"


def test_what_cannot_be_had(result: EvalResult, tmp_path: Path) -> None:
    for options, message in (
        ({"metrics": ["token_ppl", "acc"]}, r"metrics: got token_ppl, expected some that numbers, quiz have"),
        ({"metrics": ["pass@5"]}, r"metrics: got pass@5 of 4 samples"),
        ({"metrics": ["acc_pmi"]}, r"metrics: got acc_pmi, expected a task that has a neutral context"),
        ({"extractor": "best"}, r"extractor: got 'best'"),
        ({"ci": "wilson"}, r"ci: got 'wilson' for means of 4 samples"),
        ({"cluster": "page"}, r"cluster: got 'page'"),
    ):
        with pytest.raises(ConfigError, match=message):
            recompute(result, **options)
    with pytest.raises(CheckpointError, match=r"expected a finished evaluation"):
        recompute(tmp_path / "none")
