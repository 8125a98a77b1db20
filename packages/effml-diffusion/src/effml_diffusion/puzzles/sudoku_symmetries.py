"""Random symmetries of Sudoku: other valid grids from a valid grid, for whole batches at once.

Digits are renamed; rows are permuted within their bands, columns within their stacks, and bands and stacks as wholes;
grids with square boxes may be transposed. Puzzles stay as hard, and solutions stay solutions, if both undergo the same.
All symmetries are equally likely. For 9x9 there are 1.2e12, so that some thousand grids serve as endless data.

Cost: two gathers over (batch, cells), and sorts of a few numbers per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_diffusion.puzzles.sudoku import Sudoku

__all__ = ["Symmetries"]


@dataclass(frozen=True, eq=False)
class Symmetries:
    """One symmetry for each row of a batch.

    >>> clues, solutions = Sudoku(2, 2).puzzles(3, clues=5)
    >>> change = Symmetries.random(Sudoku(2, 2), 3, generator=torch.Generator().manual_seed(0))
    >>> Sudoku(2, 2).valid(change(solutions), change(clues)).tolist()
    [True, True, True]
    """

    digits: Tensor  # (batch, n + 1): what a value becomes; 0, empty, stays
    cells: Tensor  # (batch, cells): from which cell a cell's value comes

    @staticmethod
    def draws(rules: Sudoku) -> int:
        """Return how many random numbers a symmetry takes."""
        return sum(_sizes(rules))

    @classmethod
    def from_draws(cls, rules: Sudoku, numbers: Tensor) -> Symmetries:
        """Make symmetries from independent random integers (batch, draws), each uniform over all int64 below 2^63."""
        n, (bands, stacks) = rules.n, (rules.box_columns, rules.box_rows)
        digits, band, row, stack, column, turn = numbers.split(_sizes(rules), dim=1)
        rows = _blocks(band, row.unflatten(1, (bands, rules.box_rows)))
        columns = _blocks(stack, column.unflatten(1, (stacks, rules.box_columns)))
        cells = rows[:, :, None] * n + columns[:, None, :]
        if rules.box_rows == rules.box_columns:
            cells = torch.where(turn[:, :, None] % 2 == 1, cells.transpose(1, 2), cells)
        renamed = torch.nn.functional.pad(digits.argsort(dim=1) + 1, (1, 0))
        return cls(renamed, cells.flatten(1))

    @classmethod
    def random(cls, rules: Sudoku, batch: int, *, generator: torch.Generator | None = None) -> Symmetries:
        """Draw `batch` symmetries; generator: None for the global one of the CPU."""
        device = "cpu" if generator is None else generator.device
        numbers = torch.randint(2**63 - 1, (batch, cls.draws(rules)), generator=generator, device=device)
        return cls.from_draws(rules, numbers)

    def __call__(self, grids: Tensor) -> Tensor:
        """Return grids (batch, cells), int64, changed."""
        if grids.shape != self.cells.shape or grids.is_floating_point():
            got = f"{grids.dtype} {tuple(grids.shape)}"
            raise ConfigError(f"grids: got {got}, expected integers {tuple(self.cells.shape)}")
        device = grids.device
        return self.digits.to(device).gather(1, grids.long().gather(1, self.cells.to(device)))


def _sizes(rules: Sudoku) -> list[int]:
    """Return the draws for digits, bands, rows, stacks, columns, and whether to transpose."""
    return [rules.n, rules.box_columns, rules.n, rules.box_rows, rules.n, 1]


def _blocks(outer: Tensor, inner: Tensor) -> Tensor:
    """Return permutations (batch, n) that keep blocks whole, from draws (batch, blocks) and (batch, blocks, size)."""
    size = inner.shape[2]
    places = outer.argsort(dim=1)[:, :, None] * size + inner.argsort(dim=2)
    return places.flatten(1)
