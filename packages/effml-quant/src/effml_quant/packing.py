"""Codes of four and six bits in whole bytes, by shifts.

    four bits   byte = c0 | c1 << 4                                      the even index in the low nibble
    six bits    24-bit word = c0 | c1 << 6 | c2 << 12 | c3 << 18         its three bytes little-endian

Codes are packed along one axis. A length that does not fill its last group is filled with code 0, and the reader, who
knows the length, drops these. Cost: a read and a write of the codes. Layouts: OCP MX v1.0 leaves them to the machine;
these are the ones of the public MXFP4, NVFP4 and INT4 checkpoints, and for six bits the least significant bit first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from effml_shared.errors import ConfigError
from torch import Tensor

__all__ = [
    "pack_bits",
    "pack_fp4",
    "pack_fp6",
    "pack_int4",
    "packed_length",
    "signed",
    "unpack_bits",
    "unpack_fp4",
    "unpack_fp6",
    "unpack_int4",
]

_GROUPS = {4: (2, 1), 6: (4, 3)}  # bits: codes in a group, bytes of a group


def packed_length(length: int, bits: int) -> int:
    """Return the bytes that so many codes take: of four bits two in a byte, of six four in three bytes, else one each.

    >>> packed_length(33, 4), packed_length(33, 6), packed_length(33, 8)
    (17, 27, 33)
    """
    codes, size = _GROUPS.get(bits, (1, 1))
    return -(-length // codes) * size


def pack_bits(codes: Tensor, bits: int, axis: int = -1) -> Tensor:
    """Pack uint8 codes below 2^bits, trusted; other bits than four and six stay as they are."""
    if bits not in _GROUPS:
        return codes
    group = _GROUPS[bits][0]
    c = codes.movedim(axis, -1)
    c = F.pad(c, (0, -c.shape[-1] % group))
    c = c.unflatten(-1, (c.shape[-1] // group, group))
    if bits == 4:
        packed = c[..., 0] | (c[..., 1] << 4)
    else:
        words = [c[..., 0] | (c[..., 1] << 6), (c[..., 1] >> 2) | (c[..., 2] << 4), (c[..., 2] >> 4) | (c[..., 3] << 2)]
        packed = torch.stack(words, -1).flatten(-2)
    return packed.movedim(-1, axis).contiguous()


def unpack_bits(packed: Tensor, bits: int, length: int, axis: int = -1) -> Tensor:
    """Undo `pack_bits`, trusted."""
    if bits not in _GROUPS:
        return packed
    b = packed.movedim(axis, -1)
    if bits == 4:
        codes = [b & 15, b >> 4]
    else:
        b = b.unflatten(-1, (b.shape[-1] // 3, 3))
        low, middle, high = b[..., 0], b[..., 1], b[..., 2]
        codes = [low & 63, ((low >> 6) | (middle << 2)) & 63, ((middle >> 4) | (high << 4)) & 63, high >> 2]
    return torch.stack(codes, -1).flatten(-2)[..., :length].movedim(-1, axis).contiguous()


def pack_fp4(codes: Tensor, axis: int = -1) -> Tensor:
    """Pack codes 0 .. 15 in two per byte: uint8 (..., length) -> uint8 (..., ceil(length / 2)) along the axis.

    Raises:
        ConfigError: the dtype, the axis or a code is none that fits.

    >>> pack_fp4(torch.tensor([7, 15, 1], dtype=torch.uint8)).tolist()
    [247, 1]
    """
    return pack_bits(_checked(codes, torch.uint8, axis, 0, 15), 4, axis)


def unpack_fp4(packed: Tensor, length: int | None = None, axis: int = -1) -> Tensor:
    """Undo `pack_fp4`.

    Args:
        length: of the codes along the axis; None: all that the bytes hold.

    Raises:
        ConfigError: the bytes do not hold so many codes, or the dtype or axis is none that fits.
    """
    return unpack_bits(packed, 4, _length(packed, 4, length, axis), axis)


def pack_fp6(codes: Tensor, axis: int = -1) -> Tensor:
    """Pack codes 0 .. 63 in four per three bytes: uint8 (..., length) -> uint8 (..., 3 ceil(length / 4)).

    Raises:
        ConfigError: the dtype, the axis or a code is none that fits.

    >>> pack_fp6(torch.tensor([0x1F, 0x3F, 0x1F, 0x1D], dtype=torch.uint8)).numpy().tobytes().hex()
    'dfff75'
    """
    return pack_bits(_checked(codes, torch.uint8, axis, 0, 63), 6, axis)


def unpack_fp6(packed: Tensor, length: int | None = None, axis: int = -1) -> Tensor:
    """Undo `pack_fp6`; arguments and errors as of `unpack_fp4`."""
    return unpack_bits(packed, 6, _length(packed, 6, length, axis), axis)


def pack_int4(codes: Tensor, axis: int = -1) -> Tensor:
    """Pack int8 codes -8 .. 7 as two's-complement nibbles: (..., length) -> uint8 (..., ceil(length / 2)).

    Raises:
        ConfigError: the dtype, the axis or a code is none that fits.

    >>> unpack_int4(pack_int4(torch.tensor([-8, 7, -1], dtype=torch.int8)), 3).tolist()
    [-8, 7, -1]
    """
    return pack_bits(_checked(codes, torch.int8, axis, -8, 7).view(torch.uint8) & 15, 4, axis)


def unpack_int4(packed: Tensor, length: int | None = None, axis: int = -1) -> Tensor:
    """Undo `pack_int4`, to int8; arguments and errors as of `unpack_fp4`."""
    return signed(unpack_fp4(packed, length, axis), 4)


def signed(codes: Tensor, bits: int) -> Tensor:
    """Read uint8 codes below 2^bits as two's complement, to int8."""
    half = 1 << (bits - 1)
    return (codes ^ half).view(torch.int8) - half


def _checked(codes: Tensor, dtype: torch.dtype, axis: int, low: int, high: int) -> Tensor:
    _check_tensor("codes", codes, dtype, axis)
    if codes.numel():
        least, most = int(codes.min()), int(codes.max())
        if least < low or most > high:
            raise ConfigError(f"codes: got {least} to {most}, expected {low} to {high}")
    return codes


def _check_tensor(name: str, x: Tensor, dtype: torch.dtype, axis: int) -> None:
    if not isinstance(x, Tensor) or x.dtype != dtype:
        raise ConfigError(f"{name}: got {x.dtype if isinstance(x, Tensor) else type(x).__name__}, expected {dtype}")
    if not -x.ndim <= axis < x.ndim:
        raise ConfigError(f"axis: got {axis}, expected one of a tensor of shape {tuple(x.shape)}")


def _length(packed: Tensor, bits: int, length: int | None, axis: int) -> int:
    """Return the number of codes, which must be one that packs into just these bytes."""
    _check_tensor("packed", packed, torch.uint8, axis)
    group, size = _GROUPS[bits]
    found = packed.shape[axis]
    if found % size:
        raise ConfigError(f"packed: got {found} bytes along axis {axis}, expected a multiple of {size}")
    full = found // size * group
    if length is None:
        return full
    if not isinstance(length, int) or not full - group < length <= full or length < 0:
        raise ConfigError(f"length: got {length}, expected {max(full - group + 1, 0)} to {full} codes in {found} bytes")
    return length
