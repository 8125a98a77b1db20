r"""Tasks from YAML files.

    kind: multiple_choice                      # or generate, or rolling
    data: questions.jsonl                      # beside this file; so is shots, a file of examples
    prompt: "Question: {{question}}\nAnswer:"  # what `row_templates` takes: prompt, choices, gold, labels, id, tags
    choices: choices.text
    gold: answer
    metrics: [acc, acc_norm]                   # and whatever else the task takes; its name is the file's if not given

A task that generates has its sampling as a section of its own (`sampling: {max_new_tokens: 64, stop: ["\n"]}`).
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from effml_shared.checks import check_choice
from effml_shared.errors import ConfigError

from effml_eval.scoring.scorer import SamplingParams
from effml_eval.tasks.generative_task import GenerativeTask
from effml_eval.tasks.multiple_choice_task import MultipleChoiceTask
from effml_eval.tasks.perplexity_task import PerplexityTask
from effml_eval.tasks.row_templates import choice_reader, document_reader, open_reader
from effml_eval.tasks.task import Task

__all__ = ["from_yaml"]

_KINDS: dict[str, tuple[type[Task], Callable[..., Any]]] = {
    "multiple_choice": (MultipleChoiceTask, choice_reader),
    "generate": (GenerativeTask, open_reader),
    "rolling": (PerplexityTask, document_reader),
}


def from_yaml(path: str | Path) -> Task:
    """Make the task that a file describes.

    Raises:
        ConfigError: the file cannot be read, lacks something or has something unknown.
        DataError: its data cannot be read.
    """
    path = Path(path)
    content = _read(path)
    try:
        return _make(path, content)
    except TypeError as error:  # a field that is missing, or of a kind that nobody looked at before
        raise ConfigError(f"{path}: {str(error).partition(') ')[2] or error}") from None


def _make(path: Path, content: dict[str, Any]) -> Task:
    kind, data, shots = (content.pop(name, None) for name in ("kind", "data", "shots"))
    check_choice(f"{path}: kind", kind, _KINDS)
    task, reader = _KINDS[kind]
    for_rows = inspect.signature(reader).parameters
    for_task = {field.name for field in fields(task)} - {"questions", "dataset"}
    _check_names(f"{path}: ", content, for_rows.keys() | for_task)
    needed = [name for name, each in for_rows.items() if each.default is each.empty and name not in content]
    if missing := [*needed, *([] if isinstance(data, str) else ["data"])]:
        raise ConfigError(f"{path}: got no {', '.join(missing)}, expected them of a task of kind {kind}")
    options = {name: value for name, value in content.items() if name not in for_rows}
    if "sampling" in options:
        if not isinstance(options["sampling"], dict):
            raise ConfigError(f"{path}: got sampling {options['sampling']!r}, expected its fields")
        _check_names(f"{path}: sampling.", options["sampling"], [field.name for field in fields(SamplingParams)])
        options["sampling"] = SamplingParams(**options["sampling"])
    read = reader(**{name: value for name, value in content.items() if name in for_rows})
    examples = None if shots is None else path.parent / shots
    return task.from_jsonl(path.parent / data, read, shots=examples, **{"name": path.stem, **options})


def _check_names(where: str, content: Iterable[str], known: Iterable[str]) -> None:
    for name in content:
        if name not in (names := sorted(known)):
            near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)[0]
            raise ConfigError(f"{where}unknown field {name}: did you mean {near}?")


def _read(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # YAML's many parse errors
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        raise ConfigError(f"{path}: got {reason}, expected a readable YAML file") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got a {type(content).__name__}, expected fields and their values")
    return {str(name): value for name, value in content.items()}
