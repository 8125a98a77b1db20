"""The word problem of the symmetric group: say the product of all permutations read so far. Degree 2 is prefix parity.

The simplest tasks that a fixed number of parallel layers cannot do at every length: parity needs depth or precision
that grows, and for degree 5 and above the problem is complete for NC1 (arXiv 2404.08819). Every position is scored. The
degree-2 task at length 16 is the one on which a Recurrent Transformer of one layer is told from a Transformer.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError

from effml_arch.tasks.task import Bits, Ids, Task, below

__all__ = ["WordProblem", "products"]


@dataclass(frozen=True)
class WordProblem(Task):
    """Ids are the permutations of `degree` things in lexicographic order, so 0 is the identity; targets likewise.

    >>> task = WordProblem(length=4)
    >>> task.encode(np.array([[1, 0, 1, 1]], np.uint64))[1].tolist()
    [[1, 1, 0, 1]]
    """

    name: ClassVar[str] = "word problem"

    length: int = 16  # tokens, all of them scored
    degree: int = 2  # of the symmetric group: degree! ids

    def __post_init__(self) -> None:
        check_count("length", self.length, 1)
        check_count("degree", self.degree, 1)
        if self.degree > 6:
            raise ConfigError(f"degree: got {self.degree}, expected at most 6, which is 720 ids")

    @property
    def vocab_size(self) -> int:
        return math.factorial(self.degree)

    @property
    def draws(self) -> int:
        return self.length

    def encode(self, bits: Bits) -> tuple[Ids, Ids]:
        ids = below(bits, self.vocab_size)
        targets, table = np.empty_like(ids), products(self.degree)
        product = np.zeros(len(ids), np.int64)
        for t in range(self.length):
            product = table[ids[:, t], product]
            targets[:, t] = product
        return ids, targets


@cache
def products(degree: int) -> Ids:
    """Return the table (degree!, degree!) whose entry a, b is the permutation that applies b and then a."""
    group = np.array(list(itertools.permutations(range(degree))))
    places = degree ** np.arange(degree)[::-1]  # as digits, permutations are numbers in the order of their ids
    composed = group[:, group]  # (a, b, thing): a at the place where b puts the thing
    table = np.searchsorted(group @ places, composed @ places).astype(np.int64)
    table.setflags(write=False)
    return table
