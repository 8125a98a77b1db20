from __future__ import annotations

import pytest
import torch
from effml_diffusion.puzzles.sudoku import Sudoku
from effml_diffusion.puzzles.sudoku_tokens import SudokuTokens
from effml_shared.errors import ConfigError


def test_the_layout_with_ends_of_lines_has_89_tokens_of_11() -> None:
    tokens = SudokuTokens(lines=True)
    assert (tokens.length, tokens.vocab_size, tokens.mask_id, tokens.eol_id) == (89, 11, 0, 10)
    ids = tokens.encode(Sudoku().grids(2))
    assert (ids[:, 9::10] == 10).all()
    assert (ids == 10).sum(1).tolist() == [8, 8]
    plain = SudokuTokens()
    assert (plain.length, plain.vocab_size) == (81, 10)


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (2, 3), (3, 3)])
def test_decoding_gives_back_what_was_encoded(shape: tuple[int, int], lines: bool) -> None:
    tokens = SudokuTokens(Sudoku(*shape), lines=lines)
    grids = torch.randint(0, tokens.rules.n + 1, (5, tokens.rules.cells))
    ids = tokens.encode(grids)
    assert ids.shape == (5, tokens.length)
    assert ids.max() < tokens.vocab_size
    assert torch.equal(tokens.decode(ids), grids)
    assert tokens.places.shape == (tokens.length, 3)
    assert torch.equal(tokens.places[tokens.places[:, 1] < tokens.rules.n], tokens.rules.places)


def test_valid_sees_special_tokens_and_clues() -> None:
    tokens = SudokuTokens(Sudoku(2, 2), lines=True)
    puzzles = tokens.rules.puzzles(1, 5)
    ids, given = tokens.encode(puzzles.solutions), tokens.encode(puzzles.clues)
    assert tokens.valid(ids, given).tolist() == tokens.valid(ids).tolist() == [True]
    for place in range(tokens.length):
        for token in (tokens.mask_id, tokens.eol_id):
            changed = ids.clone()
            changed[0, place] = token
            assert tokens.valid(changed).item() == torch.equal(changed, ids)
    grid = tokens.decode(ids)
    renamed = tokens.encode(torch.where(grid <= 2, 3 - grid, grid))
    assert tokens.valid(renamed).item()
    assert not tokens.valid(renamed, given).item()


def test_shapes_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"grids: got .*expected integers \(batch, 81\)"):
        SudokuTokens().encode(torch.zeros(2, 80, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"grids: got torch.float32"):
        SudokuTokens().encode(torch.zeros(2, 81))
    with pytest.raises(ConfigError, match=r"ids: got \(2, 81\), expected \(batch, 89\)"):
        SudokuTokens(lines=True).decode(torch.zeros(2, 81, dtype=torch.long))
