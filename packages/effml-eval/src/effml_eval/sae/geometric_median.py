"""Geometric median: the point whose distances to all rows have the least sum; unlike the mean, outliers hardly move it.

Weiszfeld's iteration takes the mean of the rows weighted by the inverse of their distance to the current point. Where
the point falls on a row, that weight is 1 / 0; the correction of Vardi and Zhang (PNAS 97, 2000) leaves such rows out
of the mean T and goes only part of the way to it: `y <- (1 - s) T + s y` with `s = min(1, n / r)`, n rows on the point
and r the length of the sum of unit vectors towards the others. For s = 1 the point is the median.
State: none. Cost: 3 N d FLOPs and two passes over the rows per iteration, of which some 10 to 30 are needed.
"""

from __future__ import annotations

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor

__all__ = ["geometric_median"]


@torch.no_grad()
def geometric_median(x: Tensor, *, max_iterations: int = 200, tolerance: float = 1e-6) -> Tensor:
    """Return the geometric median (d,) of rows (N, d), in their dtype; float32 at least is computed in.

    Args:
        max_iterations: where it stops at the latest.
        tolerance: it stops once a move is shorter than this fraction of the mean distance to the rows.

    Raises:
        ConfigError: not a matrix with a row, or not finite.

    >>> geometric_median(torch.tensor([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]]))
    tensor([1., 1.])
    """
    check_count("max_iterations", max_iterations, 1)
    if x.ndim != 2 or not len(x) or not bool(x.isfinite().all()):
        raise ConfigError(f"x: got shape {tuple(x.shape)}, expected finite numbers (N, d) with N >= 1")
    rows = x if x.dtype == torch.float64 else x.float()
    point = rows.mean(0)
    for _ in range(max_iterations):
        distances = (rows - point).norm(dim=1)
        on_point = distances <= torch.finfo(rows.dtype).eps * distances.max()
        weights = torch.where(on_point, 0.0, 1 / distances.where(~on_point, torch.ones_like(distances)))
        total = weights.sum()
        if not float(total) > 0:  # all rows are equal
            break
        pull = weights @ rows - total * point
        share = (on_point.sum() / pull.norm().clamp_min(torch.finfo(rows.dtype).tiny)).clamp(max=1.0)
        move = (1 - share) * pull / total
        point = point + move
        if float(move.norm()) <= tolerance * float(distances.mean()):
            break
    return point.to(x.dtype)
