from __future__ import annotations

import pytest
import torch
from effml_diffusion.puzzles.sudoku import Sudoku
from effml_diffusion.puzzles.sudoku_symmetries import Symmetries
from effml_shared.errors import ConfigError


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2), (2, 3), (3, 2), (3, 3)])
def test_puzzles_stay_puzzles(shape: tuple[int, int]) -> None:
    rules = Sudoku(*shape)
    puzzles = rules.puzzles(3, max(rules.cells // 2, 1))
    change = Symmetries.random(rules, 3, generator=stream())
    clues, solutions = change(puzzles.clues), change(puzzles.solutions)
    assert rules.valid(solutions, clues).all()
    assert torch.equal((clues > 0).sum(1), (puzzles.clues > 0).sum(1))
    assert [rules.grade(row) for row in clues] == [rules.grade(row) for row in puzzles.clues]


def test_every_symmetric_grid_is_equally_likely() -> None:
    """The orbit of a 4x4 grid has 96 or 192 members, each as likely as another."""
    rules = Sudoku(2, 2)
    grid = rules.grids(1)
    draws = 96 * 500
    grids, counts = Symmetries.random(rules, draws, generator=stream())(grid.expand(draws, -1)).unique(
        dim=0, return_counts=True
    )
    assert len(grids) in (96, 192)
    expected = draws / len(grids)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - (len(grids) - 1)) < 4 * (2 * (len(grids) - 1)) ** 0.5
    assert rules.valid(grids).all()


def test_draws_decide() -> None:
    rules = Sudoku(2, 3)
    grids = rules.grids(4)
    numbers = torch.randint(2**62, (4, Symmetries.draws(rules)), generator=stream())
    once, again = (Symmetries.from_draws(rules, numbers)(grids) for _ in range(2))
    assert torch.equal(once, again)
    alone = Symmetries.from_draws(rules, numbers[2:3])(grids[2:3])
    assert torch.equal(once[2:3], alone)


def test_transposition_needs_square_boxes() -> None:
    """With 2x3 boxes, what was a row stays a row."""
    rules = Sudoku(2, 3)
    change = Symmetries.random(rules, 200, generator=stream())
    rows = change.cells.view(200, 6, 6) // 6
    assert (rows == rows[:, :, :1]).all()
    square = Symmetries.random(Sudoku(2, 2), 200, generator=stream()).cells.view(200, 4, 4) // 4
    kept = (square == square[:, :, :1]).flatten(1).all(1).float().mean()
    assert 0.3 < kept < 0.7


def test_shapes_are_checked() -> None:
    change = Symmetries.random(Sudoku(2, 2), 2)
    for grids in (torch.zeros(3, 16, dtype=torch.long), torch.zeros(2, 16)):
        with pytest.raises(ConfigError, match=r"grids: got .*expected integers \(2, 16\)"):
            change(grids)
