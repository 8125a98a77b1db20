from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from effml_eval.evaluation.answer_store import AnswerStore
from effml_eval.evaluation.asking import ask, key_of, rank_of
from effml_eval.evaluation.request_progress import RequestProgress
from effml_eval.scoring import Generation, GenerationRequest, RollingScore, Score, ScoreRequest
from effml_shared.errors import ConfigError, NonFiniteError

REQUESTS: list[Any] = [
    *[ScoreRequest("a context", f" {i}") for i in range(100)],
    "a document",
    *[GenerationRequest("a prompt", sample=sample) for sample in range(3)],
]


class Recorder:
    """A scorer that remembers what it was asked."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []

    def _answer(self, requests: Sequence[Any], *answer: Any) -> list[Any]:
        self.batches.append(list(requests))
        return [answer for _ in requests]

    def score(self, requests: Sequence[tuple[str, str]]) -> list[Score]:
        return self._answer(requests, -1.0, True, 2)

    def rolling(self, documents: Sequence[str]) -> list[RollingScore]:
        return self._answer(documents, -1.0, 2, 3, 4)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        return self._answer(requests, "text", "eos", 1)


def put(scorer: Any, store: AnswerStore, requests: Sequence[Any] = REQUESTS) -> int:
    return ask(scorer, {key_of(request): request for request in requests}, store, RequestProgress(0, None))


def test_batches_by_kind_and_only_those_that_are_missing() -> None:
    scorer, store = Recorder(), AnswerStore(None, "s")
    assert put(scorer, store) == 4
    assert sorted(map(len, scorer.batches)) == [1, 3, 36, 64]
    assert [request for batch in scorer.batches[1:3] for request in batch] == REQUESTS[:100]
    assert store.answers.keys() == {key_of(request) for request in REQUESTS}
    assert all(isinstance(answer, Score | RollingScore | Generation) for answer in store.answers.values())
    assert put(scorer, store) == 0
    del store.answers[key_of(REQUESTS[70])]
    assert put(scorer, store) == 1
    assert scorer.batches[-1] == REQUESTS[64:100]  # the whole batch
    assert store.duplicates == 35


def test_samples_are_told_apart() -> None:
    keys = [key_of(request) for request in REQUESTS]
    assert len(set(keys)) == len(keys)
    assert len({hash for hash, _ in keys[-3:]}) == 1
    assert [sample for _, sample in keys[-3:]] == [0, 1, 2]


def test_processes_share_the_requests_by_prompt() -> None:
    assert {rank_of(request, 1) for request in REQUESTS} == {0}
    assert len({rank_of(request, 4) for request in REQUESTS[:100]}) == 1  # one context is read once
    assert {rank_of(ScoreRequest(" ", f" {i}"), 4) for i in range(100)} == {0, 1, 2, 3}
    counts = [0] * 4
    for i in range(4000):
        counts[rank_of(f"document {i}", 4)] += 1
    assert all(900 < count < 1100 for count in counts)


def test_what_a_scorer_must_not_do() -> None:
    class Short(Recorder):
        def score(self, requests: Sequence[tuple[str, str]]) -> list[Score]:
            return super().score(requests)[1:]

    class Broken(Recorder):
        def rolling(self, documents: Sequence[str]) -> list[RollingScore]:
            return self._answer(documents, float("nan"), 2, 3, 4)

    with pytest.raises(ConfigError, match=r"scorer: got 63 answers, expected 64"):
        put(Short(), AnswerStore(None, "s"))
    with pytest.raises(NonFiniteError, match=r"got NaN for the request 'a document'"):
        put(Broken(), AnswerStore(None, "s"))
