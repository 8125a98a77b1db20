from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from effml_eval.grading import AnswerGrading
from effml_eval.tasks import Task, arc, gsm8k, hellaswag, openbookqa, piqa, winogrande
from effml_eval.tasks.task import Asking
from effml_shared.errors import ConfigError


def one(folder: Path, make: Callable[..., Task], row: dict[str, Any], **options: Any) -> tuple[Any, list[Any]]:
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    task = make(folder / "rows.jsonl", **options)
    return task.questions[0], task.requests(task.questions[0], "", Asking())


def test_hellaswag(tmp_path: Path) -> None:
    row = {
        "ind": 24,
        "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting [header] on a roof.",
        "ctx_b": "he",
        "ctx": "A man is sitting [header] on a roof. he",
        "endings": ["is using wrap [title] Then he rests.", "is ripping  tiles [step] off.", "a", "b"],
        "label": "1",
    }
    question, requests = one(tmp_path, hellaswag, row)
    context = "Roof shingle removal: A man is sitting on a roof. He"
    assert requests[0] == (context, " is using wrap. Then he rests.")
    assert requests[1] == (context, " is ripping tiles off.")
    assert (question.gold, len(requests), question.tags) == (1, 4, {"activity": "Roof shingle removal"})
    del row["ctx_a"], row["ctx_b"]
    assert one(tmp_path, hellaswag, {**row, "label": 1})[1][0][0] == context.replace("He", "he")


def test_piqa(tmp_path: Path) -> None:
    question, requests = one(tmp_path, piqa, {"goal": "open a jar", "sol1": "1", "sol2": "turn it", "label": 1})
    assert requests == [("Question: open a jar\nAnswer:", " 1"), ("Question: open a jar\nAnswer:", " turn it")]
    assert question.gold == 1


@pytest.mark.parametrize(
    "row",
    [
        {
            "id": "x7",
            "question": "Why?",
            "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        {
            "id": "x7",
            "question": {
                "stem": "Why?",
                "choices": [{"text": text, "label": label} for text, label in zip("abc", "ABC", strict=True)],
            },
            "answerKey": "B",
        },
    ],
)
def test_arc_and_openbookqa(tmp_path: Path, row: dict[str, Any]) -> None:
    question, requests = one(tmp_path, arc, row)
    assert requests == [("Question: Why?\nAnswer:", f" {choice}") for choice in "abc"]
    assert (question.id, question.gold) == ("x7", 1)
    if isinstance(row["question"], str):
        row["question_stem"] = row.pop("question")
    question, requests = one(tmp_path, openbookqa, row)
    assert requests == [("Why?", f" {choice}") for choice in "abc"]
    assert question.gold == 1
    with pytest.raises(ConfigError, match=r"row 1: gold: got 'E'"):
        one(tmp_path, arc, {**row, "question": row.get("question", "Why?"), "answerKey": "E"})
    with pytest.raises(ConfigError, match=r"row 1: choices: got a row with"):
        one(tmp_path, arc, {"question": "Why?", "answerKey": "E"})


def test_winogrande(tmp_path: Path) -> None:
    row = {
        "sentence": "The cup fell off the shelf as the _ was wet.",
        "option1": "cup",
        "option2": "shelf",
        "answer": "2",
    }
    question, requests = one(tmp_path, winogrande, row)
    start = "The cup fell off the shelf as the "
    assert requests == [(start + "cup", " was wet."), (start + "shelf", " was wet.")]
    assert (question.gold, question.shown) == (1, start + "shelf was wet.")
    for sentence in ("no blank", "at the end _"):
        with pytest.raises(ConfigError, match=r"expected a text with a blank _ and more behind it"):
            one(tmp_path, winogrande, {**row, "sentence": sentence})


def test_gsm8k(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "He has <<1+1=2>>2.\nSo 1,002.\n#### 1,002"}
    question, (request,) = one(tmp_path, gsm8k, row)
    assert request.prompt == "Question: How many?\nAnswer:"
    assert (question.golds, question.shown) == (("1002",), f"{request.prompt} {row['answer']}")
    assert request.sampling.stop == ("Question:",)
    task = gsm8k(tmp_path / "rows.jsonl")
    grade = AnswerGrading(task.metrics, task.extractor, task.equal).grade
    for output, correct in ((" It is $1,002.00.", 1), (" 5 + 997 = 1002 apples", 1), (" 1002 of 3", 0), (" none", 0)):
        assert grade({"output": output, "target": ["1002"]})["correct"] == correct
    with pytest.raises(ConfigError, match=r"expected a solution that ends in ####"):
        one(tmp_path, gsm8k, {"question": "How many?", "answer": "7"})
