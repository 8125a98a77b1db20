"""Three sets of problems that do not overlap, and their file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from effml_rl.solution_tree import SolutionTreeDataset, SolutionTreeTask
from effml_rl.tree_file import load_tree, save_tree
from effml_shared.errors import CheckpointError, ConfigError

TINY = SolutionTreeTask(n_states=3, n_actions=3, n_contexts=2, n_problem=3, len_range=(1, 2), n_irrelevant=0)


def test_sets_have_the_sizes_asked_for_and_share_no_prompt() -> None:
    data = SolutionTreeDataset.make(TINY, 200, 40, 60)
    assert [len(part) for part in data.parts()] == [200, 40, 60]
    sft, rl, test = ([example.prompt for example in part] for part in data.parts())
    assert not set(rl) & set(sft)
    assert not set(test) & {*sft, *rl}
    assert (len(set(rl)), len(set(test))) == (40, 60)
    assert len(set(sft)) < 200  # fine-tuning data are as they are drawn


def test_a_world_can_run_out_of_prompts() -> None:
    with pytest.raises(ConfigError, match=r"n_test: got 2000, expected no more than the \d+ new prompts"):
        SolutionTreeDataset.make(TINY, 0, 0, 2000)
    with pytest.raises(ConfigError, match=r"n_rl: got -1"):
        SolutionTreeDataset.make(TINY, 0, -1)


def test_a_file_has_world_and_problems(tmp_path: Path) -> None:
    path = tmp_path / "data.safetensors"
    data = SolutionTreeDataset.make(TINY, 20, 5, 5)
    data.save(path)
    loaded = SolutionTreeDataset.load(path)
    assert loaded.task == TINY
    assert loaded.task.tables.transitions.tolist() == TINY.tables.transitions.tolist()
    assert [list(part) for part in loaded.parts()] == [list(part) for part in data.parts()]
    assert list(loaded.task.sample(3, "rl")) == list(TINY.sample(3, "rl"))


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.safetensors"
    data = SolutionTreeDataset.make(TINY, 2, 1, 1)
    data.save(path)
    tree = load_tree(path, "solution-tree dataset 1")
    damage: dict[str, Any]
    for damage in (
        {"tables": {}},
        {"settings": {"n_states": 4}},
        {"rl": {}},
        {"sft": 3},
        {"rl": tree["rl"] | {"actions": tree["rl"]["states"]}},
    ):
        save_tree(path, "solution-tree dataset 1", tree | damage)
        with pytest.raises(CheckpointError, match=r"^[^\n]*got contents that do not fit together[^\n]*$"):
            SolutionTreeDataset.load(path)
    path.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        SolutionTreeDataset.load(path)
