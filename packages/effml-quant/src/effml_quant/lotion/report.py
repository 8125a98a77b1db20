"""What casting each layer would cost, predicted before it is done.

To second order and without correlations between weights, R = 1/2 sum g sigma^2 is E L(RR(w)) - L(w). Rounding to
nearest has u^2 d^2 in place of sigma^2 = u^2 |d| (1 - |d|): never more, and half where weights lie anywhere in a cell.
Comparing R over formats tells which layers need bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from effml_shared import distributed
from torch import Tensor

from effml_quant.lotion.penalty import penalty_gradient
from effml_quant.lotion.shards import reducer, share
from effml_quant.lotion.variance import neighbours
from effml_quant.quantizer import Quantizer

__all__ = ["LayerReport", "layer_report"]

NEAR = 0.05  # in distances of neighbours


class LayerReport(NamedTuple):
    """One layer.

    Attributes:
        name: of the weight.
        numel: how many numbers it has.
        gap: predicted rise of the loss by randomised rounding, at strength 1; NaN before any curvature is known.
        on_grid: fraction within 5 % of the distance between grid points of one of them.
        gaps: the rise under other formats, by name.
    """

    name: str
    numel: int
    gap: float
    on_grid: float
    gaps: dict[str, float]


@torch.no_grad()
def layer_report(
    name: str, weight: Tensor, curvature: tuple[Tensor, float] | None, q: Quantizer, others: Mapping[str, Quantizer]
) -> LayerReport:
    """Return the report of one weight; call it on all ranks if the weight is sharded.

    Args:
        curvature: a tensor like the weight and its factor.
        others: formats to compare with.
    """
    gaps = {other: _gap(weight, curvature, quantizer) for other, quantizer in {"": q, **others}.items()}
    return LayerReport(name, weight.numel(), gaps.pop(""), _near_grid(weight, q), gaps)


def _gap(weight: Tensor, curvature: tuple[Tensor, float] | None, q: Quantizer) -> float:
    if curvature is None:
        return float("nan")
    reduce = reducer(weight, q)
    g, factor = curvature
    _, value = penalty_gradient(_local(weight), _local(g), q, factor, reduce=reduce)
    if not distributed.is_sharded(weight):
        return float(value)
    (total,) = distributed.reduce_sum(float(value) * share(weight, q))
    return total


def _near_grid(weight: Tensor, q: Quantizer) -> float:
    if distributed.is_sharded(weight):
        weight = weight.full_tensor()
    low, high = neighbours(weight.detach(), q)
    offset = torch.minimum(weight - low, high - weight)
    return float((offset <= NEAR * (high - low)).double().mean())


def _local(x: Tensor) -> Tensor:
    return x.to_local() if distributed.is_sharded(x) else x
