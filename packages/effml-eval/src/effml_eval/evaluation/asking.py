"""Put requests to a scorer, batch by batch, and keep every answer before the next batch.

All requests are planned, whatever is known already; then batches of which every answer is known are left out, and the
others are run as a whole. So a batch has the same requests in it however often an evaluation was interrupted, and its
numbers have the same last digits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from effml_shared.errors import ConfigError, NonFiniteError

from effml_eval.evaluation.answer_store import Answer, AnswerStore, Key
from effml_eval.evaluation.request_progress import RequestProgress
from effml_eval.scoring.request_hash import request_hash
from effml_eval.scoring.scorer import Generation, GenerationRequest, RollingScore, Score, Scorer
from effml_eval.tasks.task import Request

__all__ = ["ask", "key_of", "rank_of"]

_BATCH = 64  # requests at once to a scorer that has no plan of its own


def key_of(request: Request) -> Key:
    """Return what the answer to a request is found by."""
    return request_hash(request), request.sample if isinstance(request, GenerationRequest) else 0


def rank_of(request: Request, processes: int) -> int:
    """Return which of several processes answers a request: by its prompt, so that one reads it for all its choices."""
    text = request if isinstance(request, str) else request[0]
    unit = text if text.strip() else request_hash(request)
    return int.from_bytes(hashlib.sha256(unit.encode(errors="replace")).digest()[:8]) % processes


def ask(scorer: Scorer, requests: Mapping[Key, Request], store: AnswerStore, progress: RequestProgress) -> int:
    """Have all requests answered and kept; return the number of batches that were run.

    Raises:
        ConfigError: the scorer returns another number of answers than it was asked for.
        NonFiniteError: an answer is NaN.
    """
    memory = getattr(scorer, "too_large", None)
    if isinstance(memory, set):
        memory |= store.too_large
    run = 0
    methods: list[tuple[Any, Any]] = [
        (RollingScore, scorer.rolling),
        (Score, scorer.score),
        (Generation, scorer.generate),
    ]
    for make, method in methods:
        chosen = {key: request for key, request in requests.items() if _answer_to(request) is make}
        keys, items = list(chosen), list(chosen.values())
        for batch in _plan(scorer, items):
            if all(keys[i] in store for i in batch):
                progress.skip(len(batch))
                continue
            answers: Sequence[Any] = method([items[i] for i in batch])
            if len(answers) != len(batch):
                raise ConfigError(f"scorer: got {len(answers)} answers, expected {len(batch)}")
            made = {keys[i]: _checked(make(*answer), items[i]) for i, answer in zip(batch, answers, strict=True)}
            store.add(made, memory if isinstance(memory, set) else ())
            run += 1
            progress.advance(len(batch))
    return run


def _answer_to(request: Request) -> type[Answer]:
    if isinstance(request, GenerationRequest):
        return Generation
    return RollingScore if isinstance(request, str) else Score


def _plan(scorer: Scorer, items: list[Any]) -> list[list[int]]:
    if not items:
        return []
    plan = getattr(scorer, "plan", None)
    if plan is not None:
        return plan(items)
    return [list(range(start, min(start + _BATCH, len(items)))) for start in range(0, len(items), _BATCH)]


def _checked(answer: Any, request: Request) -> Answer:
    if math.isnan(getattr(answer, "logprob", 0.0)):
        raise NonFiniteError(f"scorer: got NaN for the request {request!r:.80}, expected a log-likelihood")
    return answer
