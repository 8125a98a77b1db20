"""Files that appear whole or not at all, and damaged ones that are told in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from effml_rl.tree_file import load_tree, save_tree
from effml_shared.errors import CheckpointError
from safetensors.torch import save_file


def test_what_was_saved_comes_back_in_place_of_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "thing.safetensors"
    save_tree(path, "thing 1", {"a": torch.arange(3)})
    save_tree(path, "thing 1", {"a": torch.arange(4), "b": [None, "x"]})
    tree = load_tree(path, "thing 1")
    assert tree["a"].tolist() == [0, 1, 2, 3]
    assert tree["b"] == [None, "x"]
    assert [found.name for found in path.parent.iterdir()] == ["thing.safetensors"]


def test_other_kinds_and_damage_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "thing.safetensors"
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        load_tree(path, "thing 1")
    save_tree(path, "thing 1", {"a": torch.arange(3)})
    with pytest.raises(CheckpointError, match=r"got 'thing 1', expected a 'thing 2'"):
        load_tree(path, "thing 2")
    whole = path.read_bytes()
    for content in (b"", whole[:20], whole[:-4]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"cannot be read"):
            load_tree(path, "thing 1")
    for skeleton in ("{", '{"dict": 3}', "3"):
        save_file({"a": torch.arange(3)}, path, {"format": "effml-tree-1", "skeleton": skeleton})
        with pytest.raises(CheckpointError, match=r"^[^\n]+$"):
            load_tree(path, "thing 1")


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    with pytest.raises(CheckpointError, match=r"^cannot write .*/file/thing: File exists"):
        save_tree(tmp_path / "file" / "thing", "thing 1", {})
    with pytest.raises(CheckpointError, match=r"^cannot write .*/directory: Is a directory"):
        save_tree(tmp_path / "directory", "thing 1", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]
