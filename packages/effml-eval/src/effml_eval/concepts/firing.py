"""How often and how strongly every concept fires: the sums from which L0, dead concepts and energies are read.

State: (C) sums of codes in float64 and (C) counts in int64, over the rows seen so far, so that an answer always says
of how many rows. Cost: one pass over the stored codes; updates may be cut at any row.
"""

from __future__ import annotations

import math

import torch
from effml_shared.checks import check_count
from torch import Tensor

from effml_eval.concepts.code_entries import Codes, check_codes, entries, n_concepts_of

__all__ = ["Firing", "dead_fraction", "l0"]


class Firing:
    """Accumulate codes over batches.

    Attributes:
        rows: seen so far.
        counts: (C) int64, rows in which each concept is active (its code is not 0).
        sums: (C) float64, of its codes.

    >>> firing = Firing(3)
    >>> firing.update(torch.tensor([[3.0, 0.0, 0.0], [1.0, 2.0, 0.0]]))
    >>> firing.l0, firing.dead.tolist(), firing.energy.tolist()
    (1.5, [False, False, True], [2.0, 1.0, 0.0])
    """

    def __init__(self, n_concepts: int, *, device: torch.device | str = "cpu") -> None:
        check_count("n_concepts", n_concepts, 1)
        self.rows = 0
        self.counts = torch.zeros(n_concepts, dtype=torch.int64, device=device)
        self.sums = torch.zeros(n_concepts, dtype=torch.float64, device=device)

    def update(self, codes: Codes) -> None:
        """Add codes of some rows.

        Raises:
            ConfigError: they are not finite or have another number of concepts.
        """
        rows = check_codes("codes", codes, len(self.sums))
        if isinstance(codes, Tensor):
            self.counts += codes.detach().count_nonzero(0)
            self.sums += codes.detach().sum(0, dtype=torch.float64)
        else:
            found = entries(codes)
            self.counts += found.concepts.bincount(minlength=len(self.sums))
            self.sums.index_add_(0, found.concepts, found.values.double())
        self.rows += rows

    @property
    def l0(self) -> float:
        """Mean number of active concepts of a row; NaN without rows."""
        return int(self.counts.sum()) / self.rows if self.rows else math.nan

    @property
    def rate(self) -> Tensor:
        """(C) float64, fraction of rows in which each concept is active."""
        return self.counts.double() / self.rows

    @property
    def dead(self) -> Tensor:
        """(C) bool, concepts that were active in none of the rows."""
        return self.counts == 0

    @property
    def energy(self) -> Tensor:
        """(C) float64, mean code of each concept over all rows."""
        return self.sums / self.rows


def _fired(codes: Codes) -> Firing:
    check_codes("codes", codes)
    device = codes.device if isinstance(codes, Tensor) else codes.values.device
    firing = Firing(n_concepts_of(codes), device=device)
    firing.update(codes)
    return firing


def l0(codes: Codes) -> float:
    """Return the mean number of active concepts of a row. NaN without rows."""
    return _fired(codes).l0


def dead_fraction(codes: Codes) -> float:
    """Return the fraction of concepts that are active in none of these rows: it falls with their number, so state it.

    Signed codes whose sum is 0 are not dead.
    """
    return float(_fired(codes).dead.double().mean())
