from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from effml_eval.tasks import Document, PerplexityTask, load_task, register_task, registered_tasks, task_registry
from effml_shared.errors import ConfigError


def test_a_task_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_registry, "_MAKERS", dict(task_registry._MAKERS))

    @register_task("lines")
    def lines(path: str, **options: Any) -> PerplexityTask:
        texts = Path(path).read_text().splitlines()
        documents = [Document(id=str(i), text=text) for i, text in enumerate(texts)]
        return PerplexityTask(questions=documents, **{"name": "lines", **options})

    (tmp_path / "a:b.txt").write_text("one\ntwo\n")
    task = load_task(f"lines:{tmp_path / 'a:b.txt'}", name="mine")
    assert (task.name, len(task.questions)) == ("mine", 2)
    assert "lines" in registered_tasks()
    with pytest.raises(ConfigError, match=r"name: got 'lines', expected one that is not taken"):
        register_task("lines")(lines)


def test_names(tmp_path: Path) -> None:
    assert registered_tasks() == ["arc", "gsm8k", "hellaswag", "openbookqa", "piqa", "winogrande"]
    (tmp_path / "piqa.jsonl").write_text(json.dumps({"goal": "g", "sol1": "a", "sol2": "b", "label": 1}) + "\n")
    assert load_task(f"piqa:{tmp_path / 'piqa.jsonl'}", shots=tmp_path / "piqa.jsonl").name == "piqa"
    with pytest.raises(ConfigError, match=r"task: got 'piqa', expected piqa:FILE"):
        load_task("piqa")
    with pytest.raises(ConfigError, match=r"task: got 'pica', expected one of 'arc'"):
        load_task("pica:file")
