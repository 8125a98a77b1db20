"""How much of the data a dictionary explains, at how many active concepts.

    R2 = 1 - sum_n |x_n - y_n|^2 / sum_n |x_n - c|^2        FVU = 1 - R2

for embeddings x_n (d), reconstructions y_n and a centre c: the mean of every dimension (`"dim"`, the usual meaning),
one mean of all numbers (`"scalar"`, which flatters data whose dimensions differ in mean) or 0 (`"none"`). R2 of data
without spread about c is NaN.

State of the streamed form: three sums and one vector in float64, taken about the first row, so that a large common
mean costs no digits; the result does not depend on how rows are cut into updates beyond rounding. Cost: one pass.
A dictionary is compared with others on the front of those that no other beats in both sparsity and R2
(arXiv 2504.11695, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from effml_shared.checks import check_choice
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_eval.concepts.code_entries import BLOCK, check_matrix

__all__ = ["Reconstruction", "fvu", "pareto_front", "r2"]

CENTERS = ("dim", "scalar", "none")


class Reconstruction:
    """Accumulate errors and spread over batches.

    >>> meter = Reconstruction()
    >>> meter.update(torch.tensor([[0.0, 10.0], [2.0, 12.0]]), torch.tensor([[1.0, 11.0], [1.0, 11.0]]))
    >>> meter.r2(), round(meter.r2("scalar"), 6)
    (0.0, 0.961538)
    """

    def __init__(self) -> None:
        self.rows = 0
        self._error = self._spread = 0.0
        self._origin: Tensor | None = None
        self._shift: Tensor | None = None

    def update(self, x: Tensor, x_hat: Tensor) -> None:
        """Add embeddings x (N, d) and their reconstructions x_hat (N, d).

        Raises:
            ConfigError: they differ in shape from each other or in d from earlier ones, or hold NaN or infinity.
        """
        x = check_matrix("x", x, columns=None if self._origin is None else len(self._origin))
        x_hat = check_matrix("x_hat", x_hat, columns=x.shape[1])
        if len(x) != len(x_hat):
            raise ConfigError(f"x_hat: got {len(x_hat)} rows beside {len(x)} of x, expected one each")
        if not len(x):
            return
        if self._origin is None or self._shift is None:
            self._origin = x[0].double()
            self._shift = torch.zeros_like(self._origin)
        size = max(1, BLOCK // max(1, x.shape[1]))
        for part, part_hat in zip(x.split(size), x_hat.split(size), strict=True):
            wide = part.double()
            self._error += float((wide - part_hat).square().sum())
            wide = wide - self._origin
            self._shift += wide.sum(0)
            self._spread += float(wide.square().sum())
        self.rows += len(x)

    @property
    def mse(self) -> float:
        """Mean squared distance |x_n - y_n|^2 of a row, summed over dimensions; NaN without rows."""
        return self._error / self.rows if self.rows else math.nan

    def r2(self, center: str = "dim") -> float:
        """Return the fraction of variance explained about the centre; NaN where there is none.

        Raises:
            ConfigError: the centre is unknown.
        """
        check_choice("center", center, CENTERS)
        if self._origin is None or self._shift is None:
            return math.nan
        mean = self._origin + self._shift / self.rows
        if center == "dim":
            away = self._origin - mean
        elif center == "scalar":
            away = self._origin - mean.mean()
        else:
            away = self._origin
        # sum |x - c|^2 from the sums about the origin o: |x - o|^2 + 2 <x - o, o - c> + |o - c|^2
        spread = self._spread + float(2 * self._shift @ away + self.rows * away @ away)
        return 1 - self._error / spread if spread > 0 else math.nan


def r2(x: Tensor, x_hat: Tensor, *, center: str = "dim") -> float:
    """Return the fraction of the variance of x (N, d) that its reconstruction x_hat (N, d) explains.

    Raises:
        ConfigError: see `Reconstruction.update`, or the centre is unknown.
    """
    check_choice("center", center, CENTERS)
    meter = Reconstruction()
    meter.update(x, x_hat)
    return meter.r2(center)


def fvu(x: Tensor, x_hat: Tensor, *, center: str = "dim") -> float:
    """Return the fraction of variance unexplained, 1 - R2."""
    return 1 - r2(x, x_hat, center=center)


def pareto_front(l0: Sequence[float] | Any, r2: Sequence[float] | Any) -> list[int]:
    """Return which of several dictionaries no other beats: one is beaten by another of no more L0 and no less R2, the
    one or the other strictly. In order of L0; equals are all kept, one whose L0 or R2 is NaN never.

    Raises:
        ConfigError: the two lists differ in length.

    >>> pareto_front([8, 16, 32, 12], [0.9, 0.95, 0.94, 0.85])
    [0, 1]
    """
    points = [(float(sparsity), float(quality)) for sparsity, quality in zip(l0, r2, strict=False)]
    if len(points) != len(l0) or len(points) != len(r2):
        raise ConfigError(f"r2: got {len(r2)} values beside {len(l0)} of l0, expected one each")
    known = [i for i, point in enumerate(points) if not any(map(math.isnan, point))]
    front: list[int] = []
    for i in sorted(known, key=lambda i: (points[i][0], -points[i][1], i)):
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front
