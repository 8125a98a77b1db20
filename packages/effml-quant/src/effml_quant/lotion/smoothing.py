"""The smoothed loss itself, L_s(w) = E L(RR(w)): by enumeration for small problems, by draws for others.

Enumeration is differentiable, through the outcomes' probabilities and, by way of the scale, the outcomes: its gradient
is what the penalty's approximates. At fixed scale it is (L(u) - L(l)) / (u - l) in every weight, a finite difference
over one cell. L_s is never below the least loss on the grid. Source: arXiv 2510.08757.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_quant.lotion.variance import neighbours, randomized_round
from effml_quant.quantizer import Quantizer

__all__ = ["smoothed_loss_exact", "smoothed_loss_mc"]

Params = TypeVar("Params", Tensor, Mapping[str, Tensor])

_MOST = 20  # weights off the grid: a million outcomes
_BATCH = 1 << 22  # numbers held at once


def smoothed_loss_exact(
    fn: Callable[[Params], Tensor], params: Params, q: Quantizer, *, through_scale: bool = True
) -> Tensor:
    """Return L_s over all outcomes of rounding, a scalar, differentiable in params.

    Args:
        fn: loss of weights given as `params` are; `torch.vmap` must be able to trace it.
        params: a tensor, or tensors by name, each with scales of its own.
        through_scale: whether the gradient sees that scales depend on the weights.

    Raises:
        ConfigError: more than 20 weights are off the grid.

    >>> w = torch.tensor([0.7, 0.05], dtype=torch.float64)
    >>> round(smoothed_loss_exact(lambda w: w.square().sum(), w, Quantizer("int4", granularity="tensor")).item(), 6)
    0.495
    """
    named = _named(params)
    ends = {name: neighbours(w, q, through_scale=through_scale) for name, w in named.items()}
    free = {name: (low != high).flatten().nonzero().squeeze(1) for name, (low, high) in ends.items()}
    count = sum(map(len, free.values()))
    if count > _MOST:
        raise ConfigError(f"params: got {count} weights off the grid, expected at most {_MOST}; use smoothed_loss_mc")
    where = free.values()
    low = torch.cat([ends[name][0].flatten()[i] for name, i in free.items()])
    high = torch.cat([ends[name][1].flatten()[i] for name, i in free.items()])
    w = torch.cat([named[name].flatten()[i] for name, i in free.items()]).to(low.dtype)
    up = (w - low) / (high - low)
    sizes = [len(i) for i in where]

    def loss(bits: Tensor) -> Tensor:
        outcome = torch.where(bits, high, low).split(sizes)
        tensors = {
            name: ends[name][0].flatten().index_put((free[name],), part).view(named[name].shape)
            for name, part in zip(named, outcome, strict=True)
        }
        return fn(_like(params, tensors))

    total = low.new_zeros(())
    batch = max(1, _BATCH // max(sum(t.numel() for t in named.values()), 1))
    for codes in torch.arange(2**count, device=low.device).split(batch):
        bits = (codes[:, None] >> torch.arange(count, device=low.device)) & 1 == 1
        probability = torch.where(bits, up, 1 - up).prod(1)
        total = total + probability @ torch.vmap(loss)(bits)
    return total


@torch.no_grad()
def smoothed_loss_mc(
    fn: Callable[[Params], Tensor],
    params: Params,
    q: Quantizer,
    n: int,
    generator: torch.Generator | None = None,
) -> tuple[float, float]:
    """Return the mean of the loss over n draws of rounding, and its standard error.

    Args:
        fn: as in `smoothed_loss_exact`, but any function; without gradient.
    """
    check_count("n", n, 2)
    named = _named(params)
    losses = []
    for _ in range(n):
        draw = {name: randomized_round(w, q, generator) for name, w in named.items()}
        losses.append(float(fn(_like(params, draw))))
    mean = math.fsum(losses) / n
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in losses) / (n - 1) / n)


def _named(params: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"": params} if isinstance(params, Tensor) else dict(params)


def _like(params: Params, tensors: dict[str, Tensor]) -> Params:
    return tensors[""] if isinstance(params, Tensor) else tensors
