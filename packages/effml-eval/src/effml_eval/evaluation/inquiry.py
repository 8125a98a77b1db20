"""A task as it is put to one model: which requests belong to which question, and what to keep of the answers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from effml_shared.checks import check_count
from effml_shared.errors import ConfigError

from effml_eval.evaluation.answer_store import Answer, Key
from effml_eval.evaluation.asking import key_of
from effml_eval.grading import Intervals, Line
from effml_eval.scoring.request_hash import canonical_json
from effml_eval.scoring.scorer import GenerationRequest
from effml_eval.tasks.few_shot import Fits, Prefix, prefix_of
from effml_eval.tasks.questions import Question
from effml_eval.tasks.task import Asking, Request, Task

__all__ = ["Inquiry", "check_tasks", "describe_task", "inquire", "lines_of"]


class Inquiry(NamedTuple):
    """A question, what stands before it, and what is asked."""

    question: Question
    prefix: Prefix
    requests: list[Request]
    keys: list[Key]


def check_tasks(tasks: Sequence[Task], asking: Asking, intervals: Intervals) -> None:
    """Find out before the model is asked what could not be graded afterwards.

    Raises:
        ConfigError: there is no task, two have one name, samples of an answer would all be equal, or a metric cannot
            be had of so many samples, or with such intervals.
    """
    check_count("n_samples", asking.n_samples, 1)
    names = [task.name for task in tasks]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"tasks: got {', '.join(names) or 'none'}, expected one or more, each of another name")
    for task in tasks:
        samples = asking.n_samples if task.kind == "generate" else 1
        sampling = asking.sampling or getattr(task, "sampling", None)
        if samples > 1 and sampling is not None and sampling.temperature == 0:
            expected = "a temperature above 0, or one sample: greedy ones are all equal"
            raise ConfigError(f"n_samples: got {samples} at temperature 0 for task {task.name}, expected {expected}")
        task.grading.check(intervals, samples)


def inquire(task: Task, asking: Asking, *, limit: int | None, num_fewshot: int, fits: Fits) -> list[Inquiry]:
    """Return the questions of a task, the first `limit` of them, with examples and requests."""
    if limit is not None:
        check_count("limit", limit, 1)
    number = 0 if task.kind == "rolling" else num_fewshot
    inquiries = []
    for question in task.questions[:limit]:
        prefix = prefix_of(task, question, number, asking, fits)
        requests = task.requests(question, prefix.text, asking)
        inquiries.append(Inquiry(question, prefix, requests, [key_of(request) for request in requests]))
    return inquiries


def describe_task(task: Task, inquiries: Sequence[Inquiry], num_fewshot: int) -> dict[str, Any]:
    """Return what results record of a task."""
    first = inquiries[0].requests[0]
    return {
        "kind": task.kind,
        "version": task.version,
        "dataset": {**task.dataset, "content_sha256": task.content_hash},
        "prompt_hash": _sha256([key for inquiry in inquiries for key in inquiry.keys]),
        "questions": len(task.questions),
        "questions_sha256": _sha256([[inquiry.question.id, inquiry.question.shown] for inquiry in inquiries]),
        "evaluated": len(inquiries),
        "n_shot": 0 if task.kind == "rolling" else num_fewshot,
        "sampling": asdict(first.sampling) if isinstance(first, GenerationRequest) else None,
    }


def lines_of(task: Task, inquiries: Sequence[Inquiry], answers: Mapping[Key, Answer]) -> list[Line]:
    """Return a line for each sample of each question, not yet graded."""
    lines = []
    for question, prefix, requests, keys in inquiries:
        found = task.lines(question, [answers[key] for key in keys])
        for sample, line in enumerate(found):
            mine = keys if len(found) == 1 else keys[sample : sample + 1]
            about = {
                "task": task.name,
                "doc_id": question.id,
                "tags": dict(question.tags),
                "sample": sample,
                "request_hash": mine[0][0] if len(mine) == 1 else _sha256(mine),
                "prompt_hash": _sha256([request if isinstance(request, str) else request[0] for request in requests]),
                "requests": len(mine),
                "n_shots": prefix.n_shots,
                "shots_dropped": prefix.dropped if sample == 0 else 0,
            }
            lines.append({**about, **line})
    return lines


def _sha256(content: Any) -> str:
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()
