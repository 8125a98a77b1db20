"""Selective copying: symbols stand scattered among blanks; repeat them in order, without the blanks, when asked.

The prompt is followed by as many ask tokens as there are symbols, and only these are scored: the model must remember
what it read, at places that change from sequence to sequence, and count how much it has said. Without blanks it is
plain copying. After the selective-copying task of arXiv 2403.17844 (there and in arXiv 2312.00752 at other sizes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError

from effml_arch.tasks.task import IGNORE_INDEX, Bits, Ids, Task, below

__all__ = ["Copying"]


@dataclass(frozen=True)
class Copying(Task):
    """Ids are the symbols, then the blank, then the ask token.

    >>> task = Copying(length=6, copied=2, symbols=3)
    >>> ids, targets = task.encode(np.array([[9, 1, 8, 2, 0, 2]], np.uint64))
    >>> ids.tolist(), targets.tolist()
    ([[3, 0, 3, 2, 4, 4]], [[-100, -100, -100, -100, 0, 2]])
    """

    name: ClassVar[str] = "copying"

    length: int = 64  # tokens: prompt and answer
    copied: int = 8  # symbols in the prompt, and ask tokens behind it; half the length: no blanks
    symbols: int = 14

    def __post_init__(self) -> None:
        for name in ("length", "copied", "symbols"):
            check_count(name, getattr(self, name), 1)
        if 2 * self.copied > self.length:
            raise ConfigError(f"copied: got {self.copied}, expected at most half of length={self.length}")

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @property
    def draws(self) -> int:
        return self.length

    def encode(self, bits: Bits) -> tuple[Ids, Ids]:
        places, content = np.split(bits, [self.length - self.copied], axis=1)
        symbols = below(content, self.symbols)
        where = np.sort(np.argsort(places, axis=1, kind="stable")[:, : self.copied], axis=1)
        ids = np.full(bits.shape, self.symbols, np.int64)
        np.put_along_axis(ids, where, symbols, 1)
        ids[:, -self.copied :] = self.symbols + 1
        targets = np.full(bits.shape, IGNORE_INDEX, np.int64)
        targets[:, -self.copied :] = symbols
        return ids, targets
