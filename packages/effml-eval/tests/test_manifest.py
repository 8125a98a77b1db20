from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from effml_eval.evaluation.manifest import changed_fields, open_directory
from effml_shared.errors import CheckpointError, ConfigError

IDENTITY: dict[str, Any] = {"model": {"id": "m", "size": None}, "tasks": {"a": {"shots": [1, 2]}}, "empty": {}}


def test_a_directory_belongs_to_one_evaluation(tmp_path: Path) -> None:
    started = open_directory(tmp_path / "new" / "run", IDENTITY, resume=True)
    assert open_directory(tmp_path / "new" / "run", IDENTITY, resume=True) == started
    other = {**IDENTITY, "model": {"id": "n" * 64, "size": None}, "tasks": {"b": {"shots": [1, 2]}}}
    message = r"model.id was 'm' and is 'nnn.*nnn'; tasks.a.shots was \[1, 2\] and is 'absent'; tasks.b.shots was"
    with pytest.raises(ConfigError, match=message):
        open_directory(tmp_path / "new" / "run", other, resume=True)
    with pytest.raises(ConfigError, match=r"which holds an evaluation, expected a new directory or resume"):
        open_directory(tmp_path / "new" / "run", IDENTITY, resume=False)


def test_differences() -> None:
    assert changed_fields(json.loads(json.dumps(IDENTITY)), IDENTITY) == []
    assert changed_fields({"a": {"b": 1}}, {"a": None}) == ["a.b was 1 and is 'absent'", "a was 'absent' and is None"]


def test_places_that_do_not_serve(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be made \(Not a directory\)"):
        open_directory(tmp_path / "file" / "run", IDENTITY, resume=True)
    for content in ("", "[]", '{"schema": 1}'):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"manifest.json: cannot be read"):
            open_directory(tmp_path, IDENTITY, resume=True)
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": 0, "started": "", "identity": IDENTITY}))
    with pytest.raises(ConfigError, match=r"schema was 0 and is 1"):
        open_directory(tmp_path, IDENTITY, resume=True)
