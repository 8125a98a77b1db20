"""Unbiased randomised rounding of weights, and its variance: what LOTION smooths a loss with.

With s the scale of a weight's block and l <= w/s <= u the grid's neighbours, RR(w) is s u with probability
(w/s - l) / (u - l), else s l, independently per weight:

    E RR(w) = w        Var RR(w) = sigma^2 = (w - s l)(s u - w), at most a quarter of the squared distance of neighbours

Under a real-valued scale s = max|w| / largest, the weight of largest magnitude lies on the grid and stays there in
every outcome, so all outcomes have the scale of w and are their own cast. Under power-of-two or E4M3 scales none of
this is exact: s jumps as the largest weight moves (`rceil` keeps RR unbiased; under other rules what saturates has
variance 0). Rounding itself is `effml_quant.fake_quantize`; this module adds no second one.

A weight within a few rounding errors of a grid point counts as on it (l = u), because float32 cannot tell: w/s carries
three roundings, about 2^-22.4 of w/s. Halves of that margin would let on-grid weights of int8 miss it.

State: none. Cost: about 10 element-wise operations. Source: arXiv 2510.08757; other grids than integers derived here.
"""

from __future__ import annotations

import torch
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_quant.blocks import Blocks
from effml_quant.casting import check_input, fake_quantize
from effml_quant.formats import Format
from effml_quant.quantizer import Quantizer
from effml_quant.rounding import floor_power
from effml_quant.scales import block_scale, tensor_scale

__all__ = ["cast", "neighbours", "randomized_round", "rr_variance"]


def cast(w: Tensor, q: Quantizer) -> Tensor:
    """Round weights to the nearest grid point, ties to even; the gradient passes straight through."""
    return fake_quantize(w, q.replace(rounding="rne"))


def randomized_round(w: Tensor, q: Quantizer, generator: torch.Generator | None = None) -> Tensor:
    """Draw RR(w); the gradient passes straight through. generator None: torch's global one."""
    return fake_quantize(w, q.replace(rounding="stochastic"), generator=generator)


def neighbours(w: Tensor, q: Quantizer, *, through_scale: bool = True) -> tuple[Tensor, Tensor]:
    """Return the grid points next to each weight, s l <= w <= s u, shaped like w, in float32 or wider.

    They are equal where w is on the grid. A gradient reaches w through s alone, and only if through_scale.

    Raises:
        ConfigError: w is no dense floating tensor, or q has no symmetric range or no scale.
    """
    check_quantizer(q)
    check_input(w, q)
    if w.numel() == 0:
        return (w.float() if w.dtype != torch.float64 else w,) * 2
    blocks = Blocks.cut(tuple(w.shape), q.axis, q.block)
    view = blocks.split(w if w.dtype == torch.float64 else w.float())
    amax = view.abs().amax(blocks.dims, keepdim=True)
    scale = scale_of(amax if through_scale and is_continuous(q) else amax.detach(), q)
    with torch.no_grad():
        inside = saturate(view, scale, q)
        unit = unit_of(inside, scale, q.format)
        t = inside / unit
        nearest = t.round()
        on_grid = (t - nearest).abs() <= snap_tolerance(q.format)
        low = torch.where(on_grid, nearest, t.floor())
        high = torch.where(on_grid, nearest, t.floor() + 1)
        step = unit / scale
    return blocks.join(low * step * scale), blocks.join(high * step * scale)


def rr_variance(w: Tensor, q: Quantizer, *, through_scale: bool = True) -> Tensor:
    """Return sigma^2 of each weight under randomised rounding, shaped like w, in float32 or wider.

    Differentiable; on the grid, where sigma^2 has a kink, the derivative is 0.

    Args:
        through_scale: whether the gradient also sees that s depends on the block's largest weight.

    >>> w = torch.tensor([0.70, -0.33, 0.05, -0.21, 0.44])
    >>> [round(v, 6) for v in rr_variance(w, Quantizer("int4", granularity="tensor")).tolist()]
    [0.0, 0.0021, 0.0025, 0.0009, 0.0024]
    """
    low, high = neighbours(w, q, through_scale=through_scale)
    return torch.where(low == high, 0.0, (w - low) * (high - w)).clamp(min=0)


def check_quantizer(q: Quantizer) -> None:
    """Raise a `ConfigError` unless randomised rounding under q can be unbiased."""
    if q.scale_kind == "none":
        raise ConfigError(f"format: got {q.format.name}, expected one with a scale, such as 'int4' or 'mxfp4'")
    if q.scale_kind == "float32" and q.recipe in ("torchao", "asymmetric"):
        raise ConfigError(f"recipe: got {q.recipe!r}, expected 'symmetric': the largest weight must be on the grid")


def is_continuous(q: Quantizer) -> bool:
    """Say whether scales are real-valued, so that they have a derivative."""
    return q.scale_kind == "float32"


def scale_of(amax: Tensor, q: Quantizer) -> Tensor:
    """Return the scale of each block from its largest magnitude; 1 where it is zero or no normal number."""
    total = None
    if q.scale_kind == "e4m3" and q.recipe != "torchao":
        total = tensor_scale(amax.amax(), q)
    scale = block_scale(amax, q, total).decode.to(amax.dtype)
    return torch.where(scale < torch.finfo(amax.dtype).tiny, 1.0, scale)


def saturate(w: Tensor, scale: Tensor, q: Quantizer) -> Tensor:
    """Return w within the grid; a real-valued scale leaves nothing outside."""
    if is_continuous(q):
        return w
    bound = scale * q.format.max
    return w.clamp(-bound, bound)


def unit_of(w: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Return s (u - l), the distance of the grid points next to each weight, broadcastable to w.

    Integers have one per block; a float has one per binade, which the exponent field of w/s names.
    """
    if fmt.is_integer:
        return scale * fmt.spacing
    z = w / scale
    power = floor_power(z, fmt.emin, fmt.emax)
    mantissa = 52 if z.dtype == torch.float64 else 23
    return power.sub_(fmt.man_bits << mantissa).view(z.dtype).mul_(scale)


def snap_tolerance(fmt: Format) -> float:
    """Return how near a grid point counts as on it, in distances of neighbours."""
    return max(1e-6, 2.0 ** (fmt.man_bits - 21))
