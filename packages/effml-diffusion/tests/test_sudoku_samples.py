from __future__ import annotations

import pytest
import torch
from effml_diffusion.puzzles.sample_stream import SampleStream
from effml_diffusion.puzzles.sudoku import Sudoku
from effml_diffusion.puzzles.sudoku_samples import SudokuSamples
from effml_diffusion.puzzles.sudoku_tokens import SudokuTokens
from effml_shared.errors import ConfigError


@pytest.mark.parametrize("lines", [False, True])
def test_samples_are_solved_puzzles(lines: bool) -> None:
    tokens = SudokuTokens(Sudoku(2, 2), lines=lines)
    puzzles = tokens.rules.puzzles(5, 5)
    batch = SampleStream(SudokuSamples(tokens, puzzles.solutions, puzzles.clues)).next(100)
    assert tokens.valid(batch["input_ids"], batch["given"]).all()
    assert ((tokens.decode(batch["given"]) > 0).sum(1) == 5).all()
    assert len(batch["input_ids"].unique(dim=0)) > 50


def test_without_augmentation_samples_are_the_grids() -> None:
    tokens = SudokuTokens(Sudoku(2, 3))
    grids = tokens.rules.grids(3)
    ids = SampleStream(SudokuSamples(tokens, grids, augment=False)).next(60)["input_ids"]
    assert torch.equal(ids.unique(dim=0), grids.unique(dim=0))


def test_other_data_has_another_fingerprint() -> None:
    tokens = SudokuTokens(Sudoku(2, 2))
    grids = tokens.rules.grids(3)
    every = [
        SudokuSamples(tokens, grids),
        SudokuSamples(tokens, grids, augment=False),
        SudokuSamples(tokens, grids, grids),
        SudokuSamples(tokens, grids[:2]),
        SudokuSamples(SudokuTokens(Sudoku(2, 2), lines=True), grids),
    ]
    assert len({source.fingerprint for source in every}) == len(every)
    assert SudokuSamples(tokens, grids.clone()).fingerprint == every[0].fingerprint


def test_grids_must_be_right() -> None:
    tokens = SudokuTokens(Sudoku(2, 2))
    grids = tokens.rules.grids(2)
    for wrong, clues in ((grids[:0], None), (torch.zeros_like(grids), None), (grids, grids.flip(0))):
        with pytest.raises(ConfigError, match=r"grids: got an invalid one or none"):
            SudokuSamples(tokens, wrong, clues)
