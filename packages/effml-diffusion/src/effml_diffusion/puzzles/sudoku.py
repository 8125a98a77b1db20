"""Sudoku of any box shape: random grids, puzzles with one solution, difficulty, and a strict test of validity.

A grid of side n has n^2 cells, row by row, with values 1 .. n, and 0 where a cell is empty. With boxes of `box_rows` by
`box_columns` cells, n is their product: Sudoku(2, 2), Sudoku(2, 3), Sudoku(3, 3). Item i of a seed follows from the
seed and i alone, so that more items begin with the same ones.

Cost for 9x9, one core: a grid 0.7 ms, a unique puzzle 2.5 ms with 30 clues and 10 ms with 24; below 23, steeply more.
Keep what takes long in an `Archive`.

Source: puzzles as a test of decoding orders, arXiv 2502.06768; the generator and the grades are our own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import NamedTuple

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.seeding import derive_seed
from torch import Tensor

from effml_diffusion.puzzles.archive import Archive
from effml_diffusion.puzzles.sudoku_search import dig, fill, search, solve_by_singles

__all__ = ["Difficulty", "Puzzle", "Puzzles", "Sudoku"]

Puzzle = str | Sequence[int] | Tensor
"""Text with a symbol per cell (1-9, then A-Z; `.`, `0` or `_` where empty; white space ignored), or values."""

_SYMBOLS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LARGEST = 16  # beyond, filling a grid by search can take forever
_TRIES = 1000  # grids dug for one puzzle; at the fewest clues that exist, none may lead there


class Puzzles(NamedTuple):
    """Puzzles with one solution each."""

    clues: Tensor  # (puzzles, cells) int64, 0 where empty
    solutions: Tensor  # (puzzles, cells) int64


class Difficulty(NamedTuple):
    """How hard a puzzle with one solution is."""

    naked: bool  # falls to naked singles: always some cell with one digit left
    singles: bool  # falls to naked and hidden singles, a hidden one being a digit's only place in a unit
    guesses: int  # digits tried in cells with several candidates until the solution is found and known to be the only


@dataclass(frozen=True)
class Sudoku:
    """The rules for boxes of one shape.

    >>> rules = Sudoku(2, 2)
    >>> rules.text(rules.solve("..2. .1.. 1... ...4"))
    '4321214314323214'
    """

    box_rows: int = 3
    box_columns: int = 3

    def __post_init__(self) -> None:
        check_count("box_rows", self.box_rows, 1)
        check_count("box_columns", self.box_columns, 1)
        if self.n > _LARGEST:
            shape = f"{self.box_rows} x {self.box_columns} cells"
            raise ConfigError(f"box_rows, box_columns: got {shape}, expected boxes of at most {_LARGEST} cells")

    @property
    def n(self) -> int:
        """Cells of a row, of a column and of a box."""
        return self.box_rows * self.box_columns

    @property
    def cells(self) -> int:
        """Cells of a grid."""
        return self.n**2

    @cached_property
    def places(self) -> Tensor:
        """(cells, 3) int64: row, column and box of every cell, each from 0; what position embeddings need."""
        row, column = torch.arange(self.n).repeat_interleave(self.n), torch.arange(self.n).repeat(self.n)
        return torch.stack([row, column, row // self.box_rows * self.box_rows + column // self.box_columns], dim=1)

    @cached_property
    def _units(self) -> list[tuple[int, int, int]]:
        return [(row, self.n + column, 2 * self.n + box) for row, column, box in self.places.tolist()]

    @cached_property
    def _members(self) -> Tensor:
        """(3 n, n) int64: cells of each row, column and box."""
        order = [torch.sort(self.places[:, kind], stable=True).indices for kind in range(3)]
        return torch.cat(order).view(3 * self.n, self.n)

    def parse(self, puzzle: Puzzle) -> list[int]:
        """Return the values of a puzzle, row by row.

        Raises:
            ConfigError: it has another number of cells, a symbol or value that is not allowed, or a digit twice in a
                row, column or box.
        """
        if isinstance(puzzle, str):
            symbols = "".join(puzzle.split()).upper().replace(".", "0").replace("_", "0")
            values = [_SYMBOLS.find(symbol) for symbol in symbols]
        else:
            symbols = ""
            values = list(puzzle.flatten().tolist() if isinstance(puzzle, Tensor) else puzzle)
        if len(values) != self.cells:
            raise ConfigError(f"puzzle: got {len(values)} cells, expected {self.cells} for {self.n} x {self.n}")
        for cell, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= self.n:
                got = symbols[cell] if symbols else value
                where = f"row {cell // self.n + 1}, column {cell % self.n + 1}"
                raise ConfigError(f"puzzle: got {got!r} in {where}, expected a value from 1 to {self.n}, or empty")
        for cells in self._members.tolist():
            present = [values[cell] for cell in cells if values[cell]]
            if len(set(present)) < len(present):
                twice = next(value for value in present if present.count(value) > 1)
                where = " and ".join(
                    f"row {cell // self.n + 1}, column {cell % self.n + 1}" for cell in cells if values[cell] == twice
                )
                raise ConfigError(f"puzzle: got {twice} in {where}, expected it once per row, column and box")
        return values

    def text(self, values: Puzzle) -> str:
        """Return values as one line, a symbol per cell; the inverse of `parse`."""
        return "".join("." if not value else _SYMBOLS[value] for value in self.parse(values))

    def solve(self, puzzle: Puzzle) -> list[int]:
        """Return the one solution of a puzzle.

        Raises:
            ConfigError: it is malformed, or has no solution or several.
        """
        solutions = search(self._units, self.parse(puzzle), limit=2).solutions
        if len(solutions) != 1:
            raise ConfigError(
                f"puzzle: got one with {'several solutions' if solutions else 'no solution'}, expected exactly one"
            )
        return solutions[0]

    def count_solutions(self, puzzle: Puzzle, limit: int = 2) -> int:
        """Return the number of solutions of a puzzle, counting no further than `limit`."""
        check_count("limit", limit, 1)
        return len(search(self._units, self.parse(puzzle), limit=limit).solutions)

    def grade(self, puzzle: Puzzle) -> Difficulty:
        """Return how hard a puzzle is; ConfigError as in `solve`."""
        values = self.parse(puzzle)
        found = search(self._units, values, limit=2)
        if len(found.solutions) != 1:
            self.solve(values)  # says what is wrong
        naked, singles = (all(solve_by_singles(self._units, values, hidden=hidden)) for hidden in (False, True))
        return Difficulty(naked, singles, found.guesses)

    def grids(self, count: int, *, seed: int = 0, archive: Archive | None = None) -> Tensor:
        """Return random full grids, (count, cells) int64; from the archive if they are there, and into it if not.

        All grids are all but equally likely, as far as we can measure: see `sudoku_search`.
        """
        check_count("count", count, 1)

        def make() -> dict[str, Tensor]:
            return {"grids": _stored([self._grid(seed, index) for index in range(count)])}

        return self._made("grids", {"count": count, "seed": seed}, make, archive)["grids"].long()

    def puzzles(self, count: int, clues: int, *, seed: int = 0, archive: Archive | None = None) -> Puzzles:
        """Return random puzzles of `count` different grids with exactly so many clues and one solution each.

        Raises:
            ConfigError: no unique puzzle with so few clues was found.
        """
        check_count("count", count, 1)
        check_count("clues", clues, max(self.n - 1, 0))  # two digits that are nowhere could be exchanged
        if clues > self.cells:
            raise ConfigError(f"clues: got {clues}, expected at most {self.cells}, the cells of a grid")

        def make() -> dict[str, Tensor]:
            pairs = [self._puzzle(clues, seed, index) for index in range(count)]
            given, solved = zip(*pairs, strict=True)
            return {"clues": _stored(given), "solutions": _stored(solved)}

        made = self._made("puzzles", {"count": count, "clues": clues, "seed": seed}, make, archive)
        return Puzzles(made["clues"].long(), made["solutions"].long())

    def valid(self, grids: Tensor, clues: Tensor | None = None) -> Tensor:
        """Return which grids (batch, cells) are right, (batch,) bool.

        A grid is right if every row, column and box holds each of 1 .. n once and nothing else, and if it has the
        clues (batch, cells), 0 where empty.
        """
        for name, given in (("grids", grids), ("clues", clues)):
            if given is not None and (given.is_floating_point() or given.shape != (len(grids), self.cells)):
                got = f"{given.dtype} {tuple(given.shape)}"
                raise ConfigError(f"{name}: got {got}, expected integers ({len(grids)}, {self.cells})")
        members = self._members.to(grids.device)
        digits = torch.arange(1, self.n + 1, device=grids.device)
        right = (grids[:, members].sort(-1).values == digits).flatten(1).all(1)
        return right if clues is None else right & ((clues == 0) | (clues == grids)).all(1)

    def _grid(self, seed: int, index: int) -> list[int]:
        return fill(self._units, Random(derive_seed(seed, "sudoku grid", index)))

    def _puzzle(self, clues: int, seed: int, index: int) -> tuple[list[int], list[int]]:
        rng = Random(derive_seed(seed, "sudoku puzzle", index))
        for _ in range(_TRIES):
            grid = fill(self._units, rng)
            puzzle = dig(self._units, grid, clues, rng)
            if puzzle is not None:
                return puzzle, grid
        raise ConfigError(f"clues: got {clues}, expected more: none of {_TRIES} grids led to so sparse a unique puzzle")

    def _made(
        self, kind: str, parameters: dict[str, int], make: Callable[[], dict[str, Tensor]], archive: Archive | None
    ) -> dict[str, Tensor]:
        shape = {"box_rows": self.box_rows, "box_columns": self.box_columns}
        return make() if archive is None else archive.get(f"sudoku-{kind}", {**shape, **parameters}, make)


def _stored(grids: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(grids, dtype=torch.uint8)
