from __future__ import annotations

import sys

import pytest
import torch
from effml_diffusion.puzzles.hugging_face import as_dataset, sample_dataset
from effml_diffusion.puzzles.length_mixture import LengthMixture
from effml_diffusion.puzzles.sudoku import Sudoku
from effml_shared.errors import ConfigError, MissingExtra


def test_puzzles_become_rows() -> None:
    pytest.importorskip("datasets")
    puzzles = Sudoku(2, 2).puzzles(3, 5)
    data = as_dataset(puzzles._asdict()).with_format("torch")
    assert data.column_names == ["clues", "solutions"]
    assert torch.equal(data[:]["clues"], puzzles.clues)


def test_samples_become_rows() -> None:
    pytest.importorskip("datasets")
    data = sample_dataset(LengthMixture({2: 0.5, 3: 0.5}), 4)
    assert len(data) == 4
    assert data[0]["input_ids"][:2] == [0, 0]


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"effml-shared\[data\]"):
        as_dataset({"x": torch.zeros(2)})


def test_columns_must_agree() -> None:
    for columns in ({}, {"a": torch.zeros(2), "b": torch.zeros(3)}):
        with pytest.raises(ConfigError, match=r"columns: got"):
            as_dataset(columns)
