"""Solved grids, or puzzles with their solutions, as an endless source of token ids: a random one, randomly changed.

Symmetries make 1500 grids as good as any number. Cost: some sorts and gathers per batch, no Python per row.
"""

from __future__ import annotations

import hashlib

import torch
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_diffusion.puzzles.sudoku_symmetries import Symmetries
from effml_diffusion.puzzles.sudoku_tokens import SudokuTokens

__all__ = ["SudokuSamples"]


class SudokuSamples:
    """A source for `SampleStream`: batches with `input_ids`, and with `given` if there are clues, (rows, length) int64.

    Args:
        tokens: rules and layout.
        grids: (grids, cells), full.
        clues: (grids, cells), 0 where empty; `given` has masks there.
        augment: apply a random symmetry to each sample.

    Raises:
        ConfigError: a grid is not valid, or has not its clues.

    >>> from effml_diffusion.puzzles import sample_stream, sudoku
    >>> tokens = SudokuTokens(sudoku.Sudoku(2, 2))
    >>> stream = sample_stream.SampleStream(SudokuSamples(tokens, tokens.rules.grids(10)))
    >>> ids = stream.next(64)["input_ids"]
    >>> ids.shape, bool(tokens.valid(ids).all())
    (torch.Size([64, 16]), True)
    """

    def __init__(
        self, tokens: SudokuTokens, grids: Tensor, clues: Tensor | None = None, *, augment: bool = True
    ) -> None:
        if not len(grids) or not bool(tokens.rules.valid(grids, clues).all()):
            raise ConfigError("grids: got an invalid one or none, expected full grids, each with its clues")
        self.tokens, self.grids, self.clues, self.augment = tokens, grids, clues, augment
        digest = hashlib.sha256(grids.to(torch.uint8).numpy().tobytes())
        if clues is not None:
            digest.update(clues.to(torch.uint8).numpy().tobytes())
        self.fingerprint = f"{tokens} augment={augment} {digest.hexdigest()[:16]}"

    @property
    def draws(self) -> int:
        return 1 + self.augment * Symmetries.draws(self.tokens.rules)

    def batch(self, numbers: Tensor) -> dict[str, Tensor]:
        rows = numbers[:, 0] % len(self.grids)
        parts = {"input_ids": self.grids[rows]}
        if self.clues is not None:
            parts["given"] = self.clues[rows]
        if self.augment:
            change = Symmetries.from_draws(self.tokens.rules, numbers[:, 1:])
            parts = {name: change(part) for name, part in parts.items()}
        return {name: self.tokens.encode(part) for name, part in parts.items()}
