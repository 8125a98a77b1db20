from __future__ import annotations

import json
from pathlib import Path

import pytest
from effml_eval.scoring import SamplingParams
from effml_eval.tasks import GenerativeTask, MultipleChoiceTask, PerplexityTask, from_yaml
from effml_shared.errors import ConfigError, DataError

ROW = {"q": "Which?", "options": ["red", "blue"], "right": 1, "text": "some text"}
CHOICE = 'kind: multiple_choice\ndata: rows.jsonl\nprompt: "{{q}}"\nchoices: options\ngold: right\n'


def write(folder: Path, text: str) -> Path:
    (folder / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    (folder / "my task.yaml").write_text(text)
    return folder / "my task.yaml"


def test_three_kinds(tmp_path: Path) -> None:
    task = from_yaml(write(tmp_path, CHOICE + "metrics: [nll]\nshots: rows.jsonl\nversion: 3\n"))
    assert isinstance(task, MultipleChoiceTask)
    assert (task.name, task.metrics, task.version, len(task.shots)) == ("my task", ("nll",), 3, 1)
    assert task.questions[0].shown == "Which? blue"
    text = 'kind: generate\ndata: rows.jsonl\nprompt: "{{q}} ${x}"\ngold: right\nname: other\nextractor: last_number\n'
    task = from_yaml(write(tmp_path, text + 'sampling: {max_new_tokens: 8, stop: ["\\n"]}\n'))
    assert isinstance(task, GenerativeTask)
    assert task.sampling == SamplingParams(max_new_tokens=8, stop=("\n",))
    assert (task.name, task.questions[0].prompt, task.questions[0].golds) == ("other", "Which? ${x}", ("1",))
    task = from_yaml(write(tmp_path, "kind: rolling\ndata: rows.jsonl\n"))
    assert isinstance(task, PerplexityTask)
    assert task.questions[0].text == "some text"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kind: guess\n", r"kind: got 'guess', expected one of 'multiple_choice', 'generate', 'rolling'"),
        ("data: rows.jsonl\n", r"kind: got None"),
        ("kind: multiple_choice\nprompt: x\n", r"got no choices, gold, data, expected them"),
        (CHOICE + "metric: [acc]\n", r"unknown field metric: did you mean metrics\?"),
        (CHOICE + "metrics: [accuracy]\n", r"metrics: got 'accuracy'"),
        (CHOICE + "sampling: {temperature: 1}\n", r"unknown field sampling"),
        (CHOICE.replace("right", "wrong"), r"rows.jsonl, row 1: field wrong: got a row with"),
        ("kind: generate\ndata: rows.jsonl\nprompt: x\ngold: q\nsampling: {temp: 1}\n", r"sampling.unknown field temp"),
        ("kind: generate\ndata: rows.jsonl\nprompt: x\ngold: q\nsampling: 1\n", r"got sampling 1, expected its fields"),
        ("- a\n", r"got a list, expected fields"),
        ("a: [1\n", r"expected a readable YAML file"),
        ("", r"kind: got None"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        from_yaml(write(tmp_path, text))
    assert "my task.yaml" in str(found.value) or "rows.jsonl" in str(found.value) or "metrics" in str(found.value)
    assert "\n" not in str(found.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none.yaml: got No such file"):
        from_yaml(tmp_path / "none.yaml")
    with pytest.raises(DataError, match=r"none.jsonl: got No such file"):
        from_yaml(write(tmp_path, CHOICE.replace("rows", "none")))
