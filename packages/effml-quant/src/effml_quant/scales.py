"""From a block's largest magnitude to its scale, exactly.

`BlockScale` is what the three families of scales have in common: how a value is brought onto the element's grid, how it
is brought back, and the bounds in between. Exponents come from bits, never from a logarithm in floating point: that is
wrong just below powers of two. Cost: a few operations per block.
Sources: OCP MX v1.0, sections 5.1 and 6.3; `rceil`: arXiv 2506.08027; NVFP4: arXiv 2509.25149 and the arithmetic of
TransformerEngine (recipe `te`) and torchao (recipe `torchao`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effml_quant.quantizer import Quantizer
from effml_quant.rounding import power_of_two

__all__ = ["BlockScale", "block_scale", "carry", "decode_factor", "exponent_of", "tensor_scale"]

_E4M3_MAX, _E2M1_MAX = 448.0, 6.0


class BlockScale(NamedTuple):
    """Scales of all blocks, each tensor with one number per block.

    Attributes:
        stored: what a file holds: float8_e8m0fnu, float8_e4m3fn, or float32 (float64 for a float64 tensor).
        encode: z = x * encode, or, if None, z = x / decode.
        decode: x is about z * decode; NaN where the block is not a number.
        high, low: largest magnitudes of z above and below zero.
        zero_point: code of zero, int32; asymmetric integers only.
    """

    stored: Tensor
    encode: Tensor | None
    decode: Tensor
    high: Tensor | float
    low: Tensor | float
    zero_point: Tensor | None = None


def carry(q: Quantizer, mantissa: int) -> int:
    """Return what a scale rule adds below the exponent of a float of so many mantissa bits.

    All rules are one: a carry into the exponent is the rule's step up.
    """
    fmt = q.format
    if q.scale_rule in ("rceil", "bump"):
        return (1 << mantissa) - 1 - round((fmt.max / 2.0**fmt.emax - 1) * (1 << mantissa))
    if q.scale_rule == "ceil":
        return (1 << mantissa) - 1
    return 1 << (mantissa - fmt.man_bits - 1) if q.scale_rule == "even" else 0


def exponent_of(amax: Tensor, q: Quantizer) -> Tensor:
    """Return the unclamped exponent of the scale of each block, int32; for amax = 0 anything below -127."""
    wide = amax.dtype == torch.float64
    integer, mantissa, bias = (torch.int64, 52, 1023) if wide else (torch.int32, 23, 127)
    tiny = torch.finfo(amax.dtype).tiny
    subnormal = amax < tiny
    shift = mantissa + 1
    bits = torch.where(subnormal, amax * 2.0**shift, amax).view(integer)
    field = ((bits + carry(q, mantissa)) >> mantissa) & (0x7FF if wide else 0xFF)
    exponent = torch.where(subnormal, field - shift, field) - bias - q.format.emax
    return torch.where(amax == 0, -(1 << 14), exponent).to(torch.int32)


def tensor_scale(amax: Tensor, q: Quantizer) -> Tensor:
    """Return NVFP4's float32 scale of the tensor (te: that values are multiplied by; torchao: that they contain).

    Args:
        amax: largest finite magnitude of the tensor, a scalar.
    """
    amax = amax.float()
    if q.recipe == "torchao":
        return amax / (_E4M3_MAX * _E2M1_MAX)
    scale = (_E4M3_MAX * _E2M1_MAX / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.where((amax == 0) | (scale == 0), 1.0, scale)


def decode_factor(stored: Tensor, q: Quantizer, global_scale: Tensor | None = None) -> Tensor:
    """Return what elements are multiplied by, from stored scales, shaped like them."""
    scale = stored if stored.dtype == torch.float64 else stored.float()
    if global_scale is not None:
        scale = scale * global_scale if q.recipe == "torchao" else scale / global_scale
    return scale


def block_scale(
    amax: Tensor, q: Quantizer, global_scale: Tensor | None = None, minmax: tuple[Tensor, Tensor] | None = None
) -> BlockScale:
    """Return the scale of each block.

    Args:
        amax: largest magnitude per block, float32 or float64, NaN or infinite where the block holds such a value.
        global_scale: NVFP4's scale of the tensor, or None for recipe `torchao` without one.
        minmax: least and largest value per block; asymmetric integers need them.
    """
    fmt, kind = q.format, q.scale_kind
    finite = amax.isfinite()
    if kind == "none":
        ones = torch.ones_like(amax)
        return BlockScale(ones, ones, ones, fmt.max, -fmt.lowest)
    if kind == "e8m0":
        exponent = exponent_of(amax, q).clamp(-127, 127)
        encode, decode = power_of_two(-exponent, amax.dtype), power_of_two(exponent, amax.dtype)
        stored = torch.where(finite, exponent + 127, 255).to(torch.uint8).view(torch.float8_e8m0fnu)
        return BlockScale(stored, encode, torch.where(finite, decode, torch.nan), fmt.max, -fmt.lowest)
    if kind == "e4m3":
        return _nvfp4(amax, q, global_scale, finite)
    if q.recipe == "asymmetric" and minmax is not None:
        return _asymmetric(amax, q, minmax, finite)
    low = -fmt.lowest
    if q.recipe == "torchao":
        low = fmt.max + fmt.spacing
        scale = amax / ((fmt.max + low) / 2)
    else:
        scale = amax / fmt.max
    scale = torch.where(scale == 0, 1.0, scale)
    scale = torch.where(finite, scale, torch.nan)
    return BlockScale(scale, None, scale, fmt.max, low)


def _nvfp4(amax: Tensor, q: Quantizer, global_scale: Tensor | None, finite: Tensor) -> BlockScale:
    amax = amax.float()
    largest = torch.finfo(torch.float32).max
    if q.recipe == "torchao":
        scale = amax / _E2M1_MAX
        scale = scale if global_scale is None else scale / global_scale
        stored = scale.clamp(2.0**-6, _E4M3_MAX).to(torch.float8_e4m3fn)
        encode = 1.0 / stored.float() if global_scale is None else (1.0 / global_scale) / stored.float()
    else:
        total = torch.ones((), device=amax.device) if global_scale is None else global_scale
        stored = (amax * (total * (1.0 / _E2M1_MAX))).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn)
        encode = (1.0 / (stored.float() * (1.0 / total))).clamp(max=largest)
    decode = decode_factor(stored, q, global_scale)
    nan = torch.full_like(stored.view(torch.uint8), 0x7F).view(torch.float8_e4m3fn)
    stored = torch.where(finite, stored.view(torch.uint8), nan.view(torch.uint8)).view(torch.float8_e4m3fn)
    return BlockScale(stored, encode, torch.where(finite, decode, torch.nan), q.format.max, -q.format.lowest)


def _asymmetric(amax: Tensor, q: Quantizer, minmax: tuple[Tensor, Tensor], finite: Tensor) -> BlockScale:
    codes = 2**q.format.elem_bits - 1
    low, high = minmax[0].clamp(max=0), minmax[1].clamp(min=0)
    scale = (high / 2 - low / 2) / (codes / 2)  # halves: the difference itself may overflow
    scale = torch.where(scale == 0, 1.0, scale)
    zero = torch.where(finite, (-low / scale).round().clamp(max=codes), 0.0)  # a subnormal scale is a coarse one
    scale = torch.where(finite, scale, torch.nan)
    return BlockScale(scale, None, scale, codes - zero, zero, zero.to(torch.int32))
