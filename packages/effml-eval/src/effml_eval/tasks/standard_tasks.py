"""Six well-known benchmarks from local files, with the prompts that EleutherAI/lm-evaluation-harness has for them.

    hellaswag    "activity: context", bracketed remarks removed      arXiv 1905.07830
    piqa         "Question: goal\\nAnswer:"                           arXiv 1911.11641
    arc          "Question: question\\nAnswer:", letters as labels     arXiv 1803.05457
    openbookqa   the stem alone                                      arXiv 1809.02789
    winogrande   the options fill the blank of the context, and what follows the blank is scored; arXiv 1907.10641
    gsm8k        "Question: question\\nAnswer:", what is written up to the next "Question:"; arXiv 2110.14168

Rows may have the fields of the original files or those of the versions on the Hugging Face hub. Metrics are those that
are customary. The answer to a GSM8K question is here the last number, compared as a number; the harness also reports a
strict form, to be had with `extractor=r"regex:#### (-?[0-9.,]+)"`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from effml_shared.errors import ConfigError

from effml_eval.scoring.scorer import SamplingParams
from effml_eval.tasks.generative_task import GenerativeTask
from effml_eval.tasks.multiple_choice_task import MultipleChoiceTask
from effml_eval.tasks.questions import ChoiceQuestion, OpenQuestion, choice_question
from effml_eval.tasks.row_templates import gold_index
from effml_eval.tasks.rows import Row, get_field
from effml_eval.tasks.task_registry import register_task

__all__ = ["arc", "gsm8k", "hellaswag", "openbookqa", "piqa", "winogrande"]


@register_task("hellaswag")
def hellaswag(path: str | Path, **options: Any) -> MultipleChoiceTask:
    """Choose the ending of a scene."""
    return MultipleChoiceTask.from_jsonl(path, _hellaswag, **{"name": "hellaswag", **options})


def _hellaswag(row: Row, number: int) -> ChoiceQuestion:
    if "ctx_a" in row:
        scene = f"{row['ctx_a']} {get_field(row, 'ctx_b').capitalize()}"
    else:
        scene = get_field(row, "ctx")
    activity, endings = get_field(row, "activity_label"), [_tidy(ending) for ending in get_field(row, "endings")]
    return choice_question(
        str(number),
        _tidy(f"{activity}: {scene}"),
        endings,
        gold_index(get_field(row, "label"), endings, range(len(endings))),
        tags={"activity": str(activity)},
    )


def _tidy(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


@register_task("piqa")
def piqa(path: str | Path, **options: Any) -> MultipleChoiceTask:
    """Choose how to reach a goal."""
    return MultipleChoiceTask.from_jsonl(path, _piqa, **{"name": "piqa", **options})


def _piqa(row: Row, number: int) -> ChoiceQuestion:
    solutions = [get_field(row, "sol1"), get_field(row, "sol2")]
    gold = gold_index(get_field(row, "label"), solutions, ["0", "1"])
    return choice_question(str(number), f"Question: {get_field(row, 'goal')}\nAnswer:", solutions, gold)


@register_task("arc")
def arc(path: str | Path, **options: Any) -> MultipleChoiceTask:
    """Answer a question of school science."""

    def read(row: Row, number: int) -> ChoiceQuestion:
        return _labelled(row, number, "Question: {}\nAnswer:")

    return MultipleChoiceTask.from_jsonl(path, read, **{"name": "arc", **options})


@register_task("openbookqa")
def openbookqa(path: str | Path, **options: Any) -> MultipleChoiceTask:
    """Answer a question of school science that takes a step of reasoning."""

    def read(row: Row, number: int) -> ChoiceQuestion:
        return _labelled(row, number, "{}")

    return MultipleChoiceTask.from_jsonl(path, read, **{"name": "openbookqa", **options})


def _labelled(row: Row, number: int, prompt: str) -> ChoiceQuestion:
    """Read the two forms of these files: choices as a list of objects within the question, or as two lists."""
    question = row.get("question_stem", row.get("question"))
    choices = row.get("choices")
    if isinstance(question, dict):
        question, choices = get_field(question, "stem"), get_field(question, "choices")
    if isinstance(choices, dict):
        texts, labels = get_field(choices, "text"), get_field(choices, "label")
    elif isinstance(choices, list):
        texts, labels = ([get_field(choice, name) for choice in choices] for name in ("text", "label"))
    else:
        raise ConfigError(f"choices: got a row with {', '.join(row)}, expected texts and labels")
    gold = gold_index(get_field(row, "answerKey"), texts, labels)
    return choice_question(str(row.get("id", number)), prompt.replace("{}", str(question)), texts, gold)


@register_task("winogrande")
def winogrande(path: str | Path, **options: Any) -> MultipleChoiceTask:
    """Choose what fills the blank."""
    defaults = {"name": "winogrande", "metrics": ("acc",)}
    return MultipleChoiceTask.from_jsonl(path, _winogrande, **{**defaults, **options})


def _winogrande(row: Row, number: int) -> ChoiceQuestion:
    before, blank, after = get_field(row, "sentence").partition("_")
    if not blank or not after.strip():
        raise ConfigError(f"sentence: got {row['sentence']!r}, expected a text with a blank _ and more behind it")
    choices = (get_field(row, "option1"), get_field(row, "option2"))
    return ChoiceQuestion(
        id=str(row.get("qID", number)),
        pairs=tuple((before + choice, " " + after.strip()) for choice in choices),
        choices=choices,
        gold=gold_index(get_field(row, "answer"), choices, ["1", "2"]),
    )


@register_task("gsm8k")
def gsm8k(path: str | Path, **options: Any) -> GenerativeTask:
    """Solve a word problem."""
    defaults = {
        "name": "gsm8k",
        "extractor": "last_number",
        "equal": "numeric",
        "sampling": SamplingParams(max_new_tokens=256, stop=("Question:",)),
    }
    return GenerativeTask.from_jsonl(path, _gsm8k, **{**defaults, **options})


def _gsm8k(row: Row, number: int) -> OpenQuestion:
    solution, mark, gold = str(get_field(row, "answer")).rpartition("####")
    if not mark or not gold.strip():
        raise ConfigError(f"answer: got {solution!r:.80}, expected a solution that ends in #### and a number")
    return OpenQuestion(
        id=str(number),
        prompt=f"Question: {get_field(row, 'question')}\nAnswer:",
        golds=(gold.strip().replace(",", ""),),
        solution=f" {row['answer']}",
    )
