"""Round magnitudes to a format's values, in four modes, and code and decode them, all by arithmetic on bits.

Cost: about ten operations per element and no table. Rounding to nearest adds and subtracts 2^(23 - m) times the
power of two below |z|: the sum has exactly the wanted mantissa bits, ties to even by the machine's own rounding.
Sources: OCP MX v1.0, section 5.3; stochastic rounding: arXiv 1502.02551.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effml_quant.formats import Format

__all__ = ["ROUNDINGS", "decode", "encode", "floor_power", "power_of_two", "round_magnitude", "uniform"]

ROUNDINGS = ("rne", "away", "toward_zero", "stochastic")


def _bits(dtype: torch.dtype) -> tuple[torch.dtype, int, int]:
    """Return the integer type, mantissa bits and bias of float32 or float64."""
    return (torch.int64, 52, 1023) if dtype == torch.float64 else (torch.int32, 23, 127)


def floor_power(z: Tensor, emin: int, emax: int) -> Tensor:
    """Return the bits of the power of two below z >= 0, within 2^emin .. 2^emax, as integers: the exponent alone."""
    integer, mantissa, bias = _bits(z.dtype)
    field = ((1 << (z.element_size() * 8 - 1 - mantissa)) - 1) << mantissa
    return (z.view(integer) & field).clamp((emin + bias) << mantissa, (emax + bias) << mantissa)


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 2^exponent exactly, for integers -127 .. 127; float32's subnormal 2^-127 included."""
    integer, mantissa, bias = _bits(dtype)
    exponent = exponent.to(integer)
    bits = (exponent + bias) << mantissa
    if dtype == torch.float32:
        bits = torch.where(exponent > -bias, bits, 1 << (mantissa - 1))
    return bits.view(dtype)


def round_magnitude(z: Tensor, fmt: Format, rounding: str, noise: Tensor | None = None) -> Tensor:
    """Round z >= 0 to multiples of the local spacing; values above `fmt.max` are not clamped yet.

    Args:
        z: any shape, float32 or float64, in units of the block's scale.
        rounding: `"rne"` (nearest, ties to even), `"away"` (nearest, ties away from zero), `"toward_zero"`, or
            `"stochastic"` (up with the probability of the distance).
        noise: uniform in [0, 1), like z; for `"stochastic"`.
    """
    if fmt.emin == -126 and z.dtype == torch.float32:
        return _round_wide(z, fmt, rounding, noise)
    _, mantissa, bias = _bits(z.dtype)
    spare = 2 if fmt.is_integer else 0  # an asymmetric range reaches beyond the one binade
    # What is above the largest value saturates: one binade more is enough, and a huge z must not overflow below.
    power = floor_power(z, fmt.emin + spare, fmt.emax + spare + 1)
    man_bits = fmt.man_bits + spare
    if rounding == "rne":
        magic = (power + ((mantissa - man_bits) << mantissa)).view(z.dtype)
        return (z + magic) - magic
    inverse = (((bias + man_bits) << mantissa) + ((bias << mantissa) - power)).view(z.dtype)  # one over the spacing
    spacing = (power - (man_bits << mantissa)).view(z.dtype)
    t = z * inverse
    low = t.floor()
    if rounding == "toward_zero":
        return low * spacing
    up = t - low >= 0.5 if rounding == "away" else noise < t - low  # type: ignore[operator]
    return (low + up.to(z.dtype)) * spacing


def _round_wide(z: Tensor, fmt: Format, rounding: str, noise: Tensor | None) -> Tensor:
    """Round to a format with float32's own exponents (bfloat16): drop low bits of the integer."""
    drop = 23 - fmt.man_bits
    bits = z.view(torch.int32)
    if rounding == "rne":
        bits = bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)
    elif rounding == "away":
        bits = bits + (1 << (drop - 1))
    elif rounding == "stochastic":
        bits = bits + (noise * float(1 << drop)).to(torch.int32)  # type: ignore[operator, union-attr]
    return (bits & -(1 << drop)).view(torch.float32)


def encode(p: Tensor, negative: Tensor, fmt: Format) -> Tensor:
    """Return the codes of magnitudes p on the format's grid, as uint8 or, for integers, int8.

    Args:
        p: any shape, float32 or float64, each a value of `fmt.grid`.
        negative: bool, like p. A negative zero keeps its sign bit; an integer has none.
    """
    if fmt.is_integer:
        return (torch.where(negative, -p, p) * (1 / fmt.spacing)).to(torch.int8)
    p = p.float()
    normal = (p.view(torch.int32) >> (23 - fmt.man_bits)) - ((127 - fmt.bias) << fmt.man_bits)
    codes = torch.where(p >= fmt.min_normal, normal, (p * (1 / fmt.spacing)).to(torch.int32))
    return (codes | (negative.to(torch.int32) << (fmt.elem_bits - 1))).to(torch.uint8)


def decode(codes: Tensor, fmt: Format) -> Tensor:
    """Return the float32 values of codes (uint8, int8, or a float8 dtype), any shape."""
    if codes.dtype.is_floating_point:
        return codes.float()
    if fmt.is_integer:
        return codes.float() * fmt.spacing
    if fmt.code_dtype.is_floating_point:
        return codes.view(fmt.code_dtype).float()
    if fmt.has_nan:  # a user's own format with codes that are no numbers
        return fmt.values().to(codes.device)[codes.long()]
    wide = codes.to(torch.int32)
    sign = wide >> (fmt.elem_bits - 1)
    magnitude = (wide & ((1 << (fmt.elem_bits - 1)) - 1)) << (23 - fmt.man_bits)
    # Read as float32, the fields mean 2^(bias - 127) too little, subnormals included.
    return (magnitude | (sign << 31)).view(torch.float32) * 2.0 ** (127 - fmt.bias)


def uniform(shape: tuple[int, ...], seed: Tensor, *, device: torch.device, first: int = 0) -> Tensor:
    """Return float32 numbers in [0, 1), multiples of 2^-24, that depend only on the seed and each element's index.

    Not on how the tensor is cut: chunks and shards of one tensor pass the index of their `first` element. Two rounds
    of a 32-bit integer hash (lowbias32) over index and seed.

    Args:
        seed: int64 scalar.
    """
    count = 1
    for size in shape:
        count *= size
    index = torch.arange(first, first + count, device=device)
    seed = seed.to(device)
    h = _mix(index.to(torch.int32) ^ seed.to(torch.int32))
    h = _mix(h ^ (seed >> 32).to(torch.int32) ^ (index >> 32).to(torch.int32))
    return (((h >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24).reshape(shape)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)
