"""Sudoku grids as token ids: the cells alone, or rows joined by an end-of-line token.

The mask is id 0, the digit v is id v, the end of a line n + 1, so an empty cell is encoded as a mask. For 9x9 with
`lines` that gives the 89 tokens and the vocabulary of 11 that arXiv 2510.01384 trains on; without, 81 and 10.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from effml_shared.errors import ConfigError
from torch import Tensor
from torch.nn import functional as F

from effml_diffusion.puzzles.sudoku import Sudoku

__all__ = ["SudokuTokens"]


@dataclass(frozen=True)
class SudokuTokens:
    """How grids of some rules become sequences.

    >>> tokens = SudokuTokens(Sudoku(1, 2), lines=True)
    >>> tokens.encode(torch.tensor([[1, 2, 2, 0]])).tolist()
    [[1, 2, 3, 2, 0]]
    """

    mask_id: ClassVar[int] = 0

    rules: Sudoku = field(default_factory=Sudoku)
    lines: bool = False  # an end-of-line token between rows

    @property
    def eol_id(self) -> int:
        """The end of a line, with `lines`."""
        return self.rules.n + 1

    @property
    def vocab_size(self) -> int:
        """Ids, the mask included."""
        return self.rules.n + 1 + self.lines

    @property
    def length(self) -> int:
        """Tokens of a grid."""
        return self.rules.cells + self.lines * (self.rules.n - 1)

    @cached_property
    def places(self) -> Tensor:
        """(length, 3) int64: row, column and box of every token; at an end of line, its row and twice n."""
        if not self.lines:
            return self.rules.places
        n = self.rules.n
        ends = torch.full((n, 1, 3), n)
        ends[:, 0, 0] = torch.arange(n)
        return torch.cat([self.rules.places.view(n, n, 3), ends], dim=1).flatten(0, 1)[:-1]

    def encode(self, grids: Tensor) -> Tensor:
        """Return ids (batch, length), int64, of grids (batch, cells); empty cells become masks."""
        n = self.rules.n
        if grids.ndim != 2 or grids.is_floating_point() or grids.shape[1] != self.rules.cells:
            got = f"{grids.dtype} {tuple(grids.shape)}"
            raise ConfigError(f"grids: got {got}, expected integers (batch, {self.rules.cells})")
        if not self.lines:
            return grids.long()
        return F.pad(grids.long().view(-1, n, n), (0, 1), value=self.eol_id).flatten(1)[:, :-1]

    def decode(self, ids: Tensor) -> Tensor:
        """Return what stands in the cells, (batch, cells), whether digits or not, of ids (batch, length)."""
        if ids.ndim != 2 or ids.shape[1] != self.length:
            raise ConfigError(f"ids: got {tuple(ids.shape)}, expected (batch, {self.length})")
        return ids[:, self.places[:, 1].to(ids.device) < self.rules.n]

    def valid(self, ids: Tensor, given: Tensor | None = None) -> Tensor:
        """Return which ids (batch, length) are right grids with all that is given, (batch,) bool.

        given: ids (batch, length), masks where nothing is; cells of a right grid hold digits only, ends of lines stand
            in their places.
        """
        clues = None if given is None else self.decode(given)
        ends = self.places[:, 1].to(ids.device) == self.rules.n
        return self.rules.valid(self.decode(ids), clues) & ((ids == self.eol_id) | ~ends).all(1)
