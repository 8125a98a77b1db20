"""Evaluate a model on tasks: render every question, have the requests answered, grade the answers.

    requests -> batches -> answers, kept as they come -> lines, one per sample -> scores -> estimates

With a directory, every answer is on disk before the next batch is run; an evaluation that was killed at any instant
goes on where it was and ends with the same numbers to the last digit. What is reported follows from kept answers alone.
Under `torchrun`, each process answers the requests whose prompt hashes to its rank, and all see all answers.

    out_dir/manifest.json    what all numbers depend on        results.json, samples/   the result (`eval_result`)
            answers/         every answer (`answer_store`)     log.jsonl                what each session did

Cost beside the model's: tokenising, the intervals, and with a directory one pass over the weights for their sha256.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from effml_shared import distributed
from effml_shared.errors import CheckpointError, ConfigError
from effml_shared.seeding import capture, restore
from rich.console import Console
from torch import nn

from effml_eval.evaluation.answer_store import Answer, AnswerStore, Key
from effml_eval.evaluation.asking import ask, rank_of
from effml_eval.evaluation.eval_result import EvalResult, graded_result
from effml_eval.evaluation.inquiry import check_tasks, describe_task, inquire, lines_of
from effml_eval.evaluation.manifest import SCHEMA, now, open_directory
from effml_eval.evaluation.model_identity import describe_model, tokenizer_sha256
from effml_eval.evaluation.request_progress import RequestProgress
from effml_eval.grading import Intervals
from effml_eval.scoring.language_model_scorer import LMScorer
from effml_eval.scoring.request_hash import canonical_json
from effml_eval.scoring.scorer import SamplingParams, Scorer
from effml_eval.tasks.few_shot import fits_into
from effml_eval.tasks.task import Asking, Request, Task
from effml_eval.tasks.task_registry import load_task

__all__ = ["evaluate"]


def evaluate(
    model: Any,
    tasks: Task | str | Iterable[Task | str],
    *,
    tokenizer: Any = None,
    out_dir: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int = 0,
    n_samples: int = 1,
    sampling: SamplingParams | None = None,
    seed: int = 0,
    resume: bool = True,
    ci: str = "normal",
    level: float = 0.95,
    cluster: str | None = None,
    model_id: str | None = None,
    lineage: Sequence[str] = (),
    console: Console | None = None,
) -> EvalResult:
    """Evaluate a model; its modes and all random state are afterwards as they were.

    Args:
        model: a `Scorer`, or a model for `LMScorer`.
        tasks: one or several, or their names (see `load_task`).
        tokenizer: of a model that is no scorer.
        out_dir: where answers and results are kept; None: in memory, as within a training loop.
        limit: of the questions of each task, from its beginning.
        num_fewshot: examples before each question; fewer where they do not fit.
        n_samples: of each answer that is generated; needs a temperature.
        sampling: None: as each task says; else in its place, the task's stop strings being added.
        seed: of samples, examples and bootstraps.
        resume: go on with what is in `out_dir`; else it must be new.
        ci: `"normal"`, `"wilson"`, `"bootstrap"` or `"bca"`.
        level: of the intervals.
        cluster: the tag that questions which are not independent have in common.
        model_id: the model's name in the record; None: what it says of itself. To be given with `out_dir` for a scorer
            that is no `LMScorer`: nothing else would tell its answers from those of another.
        lineage: names of the models that it was made from; recorded.
        console: where progress is shown if it takes more than a moment; None: on stderr.

    Raises:
        ConfigError: an argument does not fit the tasks, or `out_dir` holds the evaluation of something else.
        CheckpointError: `out_dir` cannot be read or written.
        NonFiniteError: the model returns NaN.

    >>> from effml_eval.scoring.scorer import Score
    >>> from effml_eval.tasks import MultipleChoiceTask, choice_question
    >>> class Shortest:
    ...     def score(self, requests):
    ...         return [Score(-len(text), False, len(text)) for _, text in requests]
    ...     rolling = generate = lambda self, requests: []
    >>> task = MultipleChoiceTask(name="sums", questions=[choice_question("1", "1 + 1 =", ["two", "2"], 1)])
    >>> evaluate(Shortest(), task).metrics["sums"]["acc"].value
    1.0
    """
    scorer = _scorer(model, tokenizer)
    _check_place(scorer, out_dir, model_id)
    chosen = [load_task(task) if isinstance(task, str) else task for task in _listed(tasks)]
    asking = Asking(sampling=sampling, n_samples=n_samples, seed=seed)
    intervals = Intervals(ci=ci, level=level, cluster=cluster, seed=seed)
    check_tasks(chosen, asking, intervals)
    folder = None if out_dir is None else Path(out_dir)
    begun, state, fits = now(), capture(), fits_into(scorer)
    try:
        inquiries = {
            task.name: inquire(task, asking, limit=limit, num_fewshot=num_fewshot, fits=fits) for task in chosen
        }
        for task in chosen:
            _check_tag(task, cluster)
        identity = {
            "model": describe_model(scorer, model_id, lineage, weights=folder is not None),
            "tokenizer_sha256": tokenizer_sha256(scorer),
            "engine": _engine(scorer),
            "tasks": {task.name: describe_task(task, inquiries[task.name], num_fewshot) for task in chosen},
            "sampling": None if sampling is None else asdict(sampling),
            "n_samples": n_samples,
            "seeds": {"base": seed},
        }
        identity = json.loads(canonical_json(identity))  # as it will be read again
        requests: dict[Key, Request] = {}
        for inquiry in (each for task in chosen for each in inquiries[task.name]):
            requests.update(zip(inquiry.keys, inquiry.requests, strict=True))
        started = begun if folder is None else open_directory(folder, identity, resume=resume)
        answers = _answer(scorer, requests, folder, identity, begun, console)
    finally:
        restore(state)
    record = {
        **identity,
        "schema": SCHEMA,
        "config": {"limit": limit, "num_fewshot": num_fewshot, "ci": ci, "level": level, "cluster": cluster},
        "git": _git(),
        "started": started,
        "ended": now(),
    }
    lines = {task.name: lines_of(task, inquiries[task.name], answers) for task in chosen}
    result = graded_result(lines, {task.name: task.grading for task in chosen}, record, intervals)
    if folder is not None:
        with distributed.agreed("writing the results"):
            if distributed.is_main():
                result.save(folder)
    return result


def _answer(
    scorer: Scorer,
    requests: dict[Key, Request],
    folder: Path | None,
    identity: dict[str, Any],
    begun: str,
    console: Console | None,
) -> dict[Key, Answer]:
    """Return the answers to all requests, of which this process has those of its rank answered."""
    rank, processes = distributed.rank(), distributed.world_size()
    parts = {name: identity[name] for name in ("model", "tokenizer_sha256", "engine", "seeds")}
    scope = hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]
    mine = {key: request for key, request in requests.items() if rank_of(request, processes) == rank}
    shown = (console or Console(stderr=True)) if distributed.is_main() else None
    work = _work(scorer)
    with distributed.agreed("evaluating"), AnswerStore(folder, scope, rank) as store:
        known = sum(key in store for key in mine)
        with RequestProgress(len(mine), shown) as progress:
            batches = ask(scorer, mine, store, progress)
    if folder is not None and distributed.is_main():
        _log(
            folder / "log.jsonl",
            {
                "started": begun,
                "ended": now(),
                "requests": len(mine),
                "known": known,
                "batches": batches,
                "lines": {name: getattr(store, name) for name in ("duplicates", "damaged", "unfinished")},
                "work": {name: value - work[name] for name, value in _work(scorer).items()},
            },
        )
    if processes > 1:
        store.read_all()
    return store.answers


def _scorer(model: Any, tokenizer: Any) -> Scorer:
    if all(hasattr(model, name) for name in ("score", "rolling", "generate")):
        if tokenizer is not None:
            raise ConfigError("tokenizer: got one for a scorer, expected it with a model only")
        scorer: Scorer = model
        return scorer
    if tokenizer is None:
        raise ConfigError(f"tokenizer: got None, expected that of the {type(model).__name__}")
    return LMScorer(model, tokenizer)


def _check_place(scorer: Scorer, out_dir: str | Path | None, model_id: str | None) -> None:
    """Raise a `ConfigError` if answers could not be brought together, or told from those of another model."""
    if out_dir is None and distributed.world_size() > 1:
        raise ConfigError("out_dir: got None with several processes, expected a directory that all of them reach")
    if out_dir is not None and model_id is None and not isinstance(scorer, LMScorer):
        raise ConfigError(f"model_id: got None for a {type(scorer).__name__} with out_dir, expected the model's name")
    model: Any = scorer.model.model if isinstance(scorer, LMScorer) else None
    if isinstance(model, nn.Module) and any(map(distributed.is_sharded, model.parameters())):
        raise ConfigError("model: got one that is sharded over processes, expected a whole one in each")


def _listed(tasks: Task | str | Iterable[Task | str]) -> list[Task | str]:
    return [tasks] if isinstance(tasks, Task | str) else list(tasks)


def _check_tag(task: Task, cluster: str | None) -> None:
    missing = [question for question in task.questions if cluster is not None and cluster not in question.tags]
    if missing:
        known = ", ".join(missing[0].tags) or "none"
        raise ConfigError(f"cluster: got {cluster!r}, expected a tag of task {task.name} (question has {known})")


def _engine(scorer: Scorer) -> dict[str, Any]:
    """Return what changes the last digits of answers, or more, beside model and requests."""
    device = scorer.model.device if isinstance(scorer, LMScorer) else torch.device("cpu")
    return {
        "effml": importlib.metadata.version("effml-eval"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processes": distributed.world_size(),
        "settings": getattr(scorer, "settings", {}),
    }


def _git() -> dict[str, Any]:
    """Return the commit of the code in the working directory, and whether its files differ from it."""

    def run(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = run("status", "--porcelain", "--untracked-files=no")
    return {"commit": run("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _work(scorer: Scorer) -> dict[str, int]:
    work: Any = getattr(scorer, "work", None)
    return asdict(work) if is_dataclass(work) and not isinstance(work, type) else {}


def _log(path: Path, row: dict[str, Any]) -> None:
    try:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); free space, then go on") from None
