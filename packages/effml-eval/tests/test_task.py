from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from effml_eval.tasks import Document, MultipleChoiceTask, choice_question, choice_reader
from effml_shared.errors import ConfigError, DataError

QUESTIONS = [choice_question(str(i), f"{i} + 1 =", [str(i + 1), "0"], 0) for i in range(3)]


def test_what_is_no_task() -> None:
    refused: list[tuple[dict[str, Any], str]] = [
        ({"questions": []}, r"task sums: got no questions"),
        ({"questions": [*QUESTIONS, QUESTIONS[1]]}, r"task sums: got 1 ids more than once, such as '1'"),
        ({"questions": [Document(id="1", text="")]}, r"task sums: got a Document, expected ChoiceQuestion"),
        ({"questions": QUESTIONS, "shots": [Document(id="1", text="")]}, r"got a Document"),
        ({"questions": QUESTIONS, "shot_choice": "best"}, r"shot_choice: got 'best'"),
        ({"questions": QUESTIONS, "name": "a/b"}, r"name: got 'a/b'"),
        ({"questions": QUESTIONS, "version": -1}, r"version: got -1"),
    ]
    for options, message in refused:
        with pytest.raises(ConfigError, match=message):
            MultipleChoiceTask(**{"name": "sums", **options})


def test_the_hash_is_of_all_content() -> None:
    def hash_of(**options: Any) -> str:
        return MultipleChoiceTask(**{"name": "sums", "questions": QUESTIONS, **options}).content_hash

    assert hash_of() == hash_of(name="other", metrics=("nll",), version=2)
    others = [hash_of(questions=QUESTIONS[:2]), hash_of(questions=QUESTIONS[::-1]), hash_of(shots=QUESTIONS)]
    assert len({hash_of(), *others}) == 4


def test_rows_of_a_file(tmp_path: Path) -> None:
    rows = [{"q": f"{i} + 1", "options": [str(i + 1), "0"], "right": 0} for i in range(3)]
    path = tmp_path / "sums.test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = choice_reader("{{q}} =", "options", "right")
    task = MultipleChoiceTask.from_jsonl(path, read, shots=path, metrics=("acc",))
    assert list(task.questions) == list(task.shots) == QUESTIONS
    assert (task.name, task.metrics) == ("sums", ("acc",))
    assert task.dataset["name"] == "sums.test.jsonl"
    assert len(task.dataset["sha256"]) == 64
    with path.open("a") as file:
        file.write(json.dumps({**rows[0], "right": 2}) + "\n")
    with pytest.raises(ConfigError, match=r"sums.test.jsonl, row 4: question 3: got gold 2"):
        MultipleChoiceTask.from_jsonl(path, read)
    with pytest.raises(DataError, match=r"No such file"):
        MultipleChoiceTask.from_jsonl(tmp_path / "none.jsonl", read)
