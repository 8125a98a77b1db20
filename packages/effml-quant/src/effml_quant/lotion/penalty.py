"""LOTION's penalty: what randomised rounding adds to a loss, to second order, and its gradient.

    R(w) = 1/2 sum_i g_i sigma_i^2(w)        g: diagonal of the Gauss-Newton matrix, held constant; sigma^2: `variance`

For a quadratic loss with Hessian diagonal g, E L(RR(w)) = L(w) + R(w) exactly. Inside a cell of the grid, with u the
distance of its two ends, d the signed offset from the nearer end in units of u and e = sign(d) - d,

    sigma^2 = u^2 d e          d sigma^2 / dw at fixed scale = u (e - d)          both 0 on the grid, the kink

sigma^2 has degree two in (w, s): w d/dw + s d/ds = 2. Hence with h the gradient at fixed scale, the block's largest
weights, of magnitude a, share (2 R - <w, h>) / a among them, each with its sign. In every block <w, grad R> = 2 R.

`lotion_penalty` is for autograd. `penalty_gradient` computes the gradient directly: on a CPU with a C compiler in one
sweep over each block (`compiled`: 16 bytes of memory traffic per weight, about 0.5 ns on one core), else by some twenty
operations of torch. State: none.

Source: arXiv 2510.08757. Whether its runs differentiated through s is not known to us; without, much is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_quant.blocks import Blocks
from effml_quant.casting import check_input
from effml_quant.lotion.compiled import add_gradient
from effml_quant.lotion.variance import (
    check_quantizer,
    is_continuous,
    rr_variance,
    saturate,
    scale_of,
    snap_tolerance,
    unit_of,
)
from effml_quant.quantizer import Quantizer

__all__ = ["Reduce", "lotion_penalty", "penalty_gradient"]

Reduce = Callable[[Tensor, str], Tensor]
"""`reduce(values, "max" | "sum")` combines one tensor over the shards of a weight whose blocks span them."""


def lotion_penalty(w: Tensor, g: Tensor, q: Quantizer, through_scale: bool = True) -> Tensor:
    """Return R(w), a scalar in float32 or wider, differentiable in w; g, like w, is a constant."""
    _check_curvature(w, g)
    return 0.5 * (g.detach() * rr_variance(w, q, through_scale=through_scale)).sum()


@torch.no_grad()
def penalty_gradient(
    w: Tensor,
    g: Tensor,
    q: Quantizer,
    strength: float = 1.0,
    through_scale: bool = True,
    *,
    out: Tensor | None = None,
    reduce: Reduce | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of strength R and its value: like w and a scalar, both in float32 or wider.

    Args:
        w: any shape and floating dtype.
        g: curvature, like w.
        strength: factor of R.
        through_scale: as in `rr_variance`.
        out: a tensor like w, to which the gradient is added in place of a new one.
        reduce: w is one shard of a weight whose blocks span shards. The value is then that of all shards.

    Raises:
        ConfigError: as `rr_variance`, or g or out has another shape.
    """
    check_quantizer(q)
    check_input(w, q)
    _check_curvature(w, g)
    if out is not None and out.shape != w.shape:
        raise ConfigError(f"out: got shape {tuple(out.shape)}, expected that of the weight, {tuple(w.shape)}")
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    total = torch.zeros_like(w, dtype=wide, memory_format=torch.contiguous_format) if out is None else out
    blocks = Blocks.cut(tuple(w.shape), q.axis, q.block)
    weights, curvature = _rows(w.detach().to(wide), blocks), _rows(g.detach().to(wide), blocks)
    trailing = blocks.dims == tuple(range(len(blocks.view) - len(blocks.dims), len(blocks.view)))
    in_place = trailing and not blocks.is_padded and total.is_contiguous() and total.dtype == wide
    rows = _rows(total.detach(), blocks) if in_place else torch.zeros_like(weights)
    through_scale = through_scale and is_continuous(q)
    values = None if reduce else add_gradient(weights, curvature, rows, q, strength, through_scale)
    if values is None:
        values = _add_gradient(weights, curvature, rows, q, strength, through_scale, reduce)
    if not in_place:
        total.add_(_unrows(rows, blocks))
    return total, strength * values.double().sum().to(wide)


def _add_gradient(
    w: Tensor, g: Tensor, out: Tensor, q: Quantizer, strength: float, through_scale: bool, reduce: Reduce | None
) -> Tensor:
    """Add the gradient to `out` and return R of each block; all are (blocks, length)."""
    amax = w.abs().amax(1, keepdim=True) if w.numel() else w.new_zeros((len(w), 1))
    if reduce is not None:
        amax = reduce(amax, "max")
    scale = scale_of(amax, q) if len(w) else amax
    x = saturate(w, scale, q)
    unit = unit_of(x, scale, q.format)
    d = x / unit
    d = F.hardshrink(d.sub_(d.round()), snap_tolerance(q.format))
    e = d.sign().sub_(d)
    weight = g * unit
    h = e.mul_(weight)
    value = (h * unit).mul_(d).sum(1)
    h.addcmul_(d, weight, value=-1)
    out.add_(h, alpha=0.5 * strength)
    if not through_scale and reduce is None:
        return 0.5 * value
    largest = w.abs() == amax
    sums = torch.stack([value, (x * h).sum(1), largest.sum(1).to(w.dtype)])
    value, along, ties = sums if reduce is None else reduce(sums, "sum")
    if through_scale:
        share = strength * (value - 0.5 * along)[:, None] / (torch.where(amax == 0, 1.0, amax) * ties[:, None])
        out.add_(torch.where(largest, share * w.sign(), 0.0))
    return 0.5 * value


def _order(blocks: Blocks) -> list[int]:
    return [a for a in range(len(blocks.view)) if a not in blocks.dims] + list(blocks.dims)


def _rows(x: Tensor, blocks: Blocks) -> Tensor:
    """Show a tensor as (blocks, length); a copy unless blocks lie one after the other."""
    view = blocks.split(x)
    length = math.prod(blocks.view[a] for a in blocks.dims)
    return view.permute(_order(blocks)).reshape(math.prod(blocks.broadcast), length)


def _unrows(rows: Tensor, blocks: Blocks) -> Tensor:
    order = _order(blocks)
    view = rows.reshape([blocks.view[a] for a in order])
    return blocks.join(view.permute([order.index(a) for a in range(len(order))]))


def _check_curvature(w: Tensor, g: Tensor) -> None:
    if not isinstance(g, Tensor) or g.shape != w.shape:
        got = f"shape {tuple(g.shape)}" if isinstance(g, Tensor) else type(g).__name__
        raise ConfigError(f"g: got {got}, expected a tensor like the weight, {tuple(w.shape)}")
