"""Examples in front of a question: which ones, and how many of them fit.

A prompt that is longer than what the model reads would be cut from the left, through the middle of an example and at
worst of the question. So whole examples are dropped first, the one farthest from the question first, until all requests
of the question fit; how many were dropped is part of the result. Only an `LMScorer` says what fits.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.seeding import derive_seed

from effml_eval.scoring.language_model_scorer import LMScorer
from effml_eval.scoring.scorer import GenerationRequest, Scorer
from effml_eval.scoring.token_boundaries import fit, split_pair
from effml_eval.tasks.questions import Question
from effml_eval.tasks.task import Asking, Request, Task

__all__ = ["Prefix", "choose_shots", "fits_into", "prefix_of"]

Fits = Callable[[Request], bool]


class Prefix(NamedTuple):
    """What opens every prompt of a question."""

    text: str
    n_shots: int  # examples in it
    dropped: int  # examples that there was no room for


def choose_shots(task: Task, question: Question, number: int, seed: int) -> list[Question]:
    """Return the examples of a question; none of them reads like the question itself.

    Raises:
        ConfigError: the task has not as many.
    """
    check_count("num_fewshot", number, 0)
    if not number:
        return []
    shown = question.shown
    pool = [shot for shot in task.shots if shot.shown != shown]
    if number > len(pool):
        expected = "no more than the task has beside the question itself"
        raise ConfigError(f"num_fewshot: got {number} for task {task.name}, which has {len(pool)}, expected {expected}")
    if task.shot_choice == "first":
        return pool[:number]
    return random.Random(derive_seed(seed, "examples", task.name, question.id)).sample(pool, number)


def prefix_of(task: Task, question: Question, number: int, asking: Asking, fits: Fits) -> Prefix:
    """Return the description and as many examples of a question, up to a number, as fit."""
    shots = [shot.shown + task.separator for shot in choose_shots(task, question, number, asking.seed)]
    opening = task.description + task.separator if task.description else ""
    asking = replace(asking, n_samples=1)  # of which all have one prompt
    for dropped in range(len(shots) + 1):
        text = opening + "".join(shots[dropped:])
        if dropped == len(shots) or all(map(fits, task.requests(question, text, asking))):
            break
    return Prefix(text, len(shots) - dropped, dropped)


def fits_into(scorer: Scorer) -> Fits:
    """Return a function that says whether the scorer answers a request without cutting its context."""
    if not isinstance(scorer, LMScorer):
        return lambda request: True
    tokenizer, longest = scorer.tokenizer, scorer.max_length

    def fits(request: Request) -> bool:
        if isinstance(request, str):
            return True  # documents are read in windows
        if isinstance(request, GenerationRequest):
            return len(tokenizer.encode(request.prompt, opened=True)) <= longest - request.sampling.max_new_tokens
        prefix_id, strict = scorer.prefix_token_id, scorer.strict_boundary
        return fit(split_pair(tokenizer, *request, prefix_id=prefix_id, strict=strict), longest)[1] == 0

    return fits
