"""Statistics over the rows of all ranks, so that a step does not depend on how many there are.

One small all-reduce each (rewards are a number per completion); in one process nothing is communicated. Every rank must
call them together, with as many columns.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from effml_shared import distributed
from effml_shared.errors import ConfigError
from effml_shared.tensors import widen
from torch import Tensor

__all__ = ["RankRows", "means", "whiten"]


class RankRows:
    """Where this rank's rows stand among those of all ranks, in the order of ranks."""

    def __init__(self, rows: int) -> None:
        sizes = [0.0] * distributed.world_size()
        sizes[distributed.rank()] = float(rows)
        sizes = distributed.reduce_sum(*sizes)
        self.rows, self.total = rows, int(sum(sizes))
        self.start = int(sum(sizes[: distributed.rank()]))

    def gather(self, values: Tensor) -> Tensor:
        """Return the rows (rows, columns) of all ranks, (total, columns), on the CPU."""
        values = values.detach().cpu()
        if distributed.world_size() == 1:
            return values
        whole = torch.zeros(self.total, *values.shape[1:], dtype=torch.float64)
        whole[self.start : self.start + self.rows] = values.double()
        summed = distributed.reduce_sum(*whole.flatten().tolist())
        return torch.tensor(summed, dtype=torch.float64).view(whole.shape).to(values.dtype)

    def own(self, whole: Tensor) -> Tensor:
        """Return this rank's part of what was computed from all rows."""
        return whole[self.start : self.start + self.rows]


def whiten(values: Tensor, mask: Tensor, *, eps: float = 1e-8) -> Tensor:
    """Return `effml_rl.gae.whiten` of the values (rows, T) of all ranks: this rank's rows, 0 outside the mask.

    Raises:
        ConfigError: a single slot is counted.
    """
    values = torch.where(mask, widen(values), 0.0)
    total, count = distributed.reduce_sum(float(values.sum(dtype=torch.float64)), float(mask.sum()))
    if count == 1:
        raise ConfigError("mask: got a single counted token, expected at least 2 to have a variance")
    centred = torch.where(mask, values - total / max(count, 1), 0.0)
    (squares,) = distributed.reduce_sum(float(centred.square().sum(dtype=torch.float64)))
    return centred * (squares / max(count - 1, 1) + eps) ** -0.5


def means(sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return from a sum and a count of this rank under each name their quotients over all ranks; 0 where count is 0."""
    names = sorted(sums)
    flat = distributed.reduce_sum(*[float(number) for name in names for number in sums[name]]) if names else []
    return {
        name: total / count if count else 0.0 for name, total, count in zip(names, flat[::2], flat[1::2], strict=True)
    }
