"""A quantised tensor as it is stored: packed codes, scales, and how they were made.

    quantize(x, fmt).dequantize() == fake_quantize(x, fmt)      bit for bit, but that an integer's zero has no sign

Bytes per element: MXFP8 and MXINT8 1.03, MXFP6 0.78, MXFP4 0.53, NVFP4 0.56. `QTensor` is a plain object, no subclass
of Tensor: products of torch (`linear`, `matmul`, `conv2d`, ...) take it and compute with its values, which are exact in
bfloat16 where the scale is a power of two; whatever else is done with it, `dequantize()` or its plain tensors do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_quant import kernels
from effml_quant.blocks import Blocks
from effml_quant.casting import (
    FLOATS,
    Codes,
    check_global_scale,
    check_input,
    dequantize_blocks,
    draw_seed,
    quantize_blocks,
)
from effml_quant.formats import Format
from effml_quant.packing import pack_bits, packed_length, signed, unpack_bits
from effml_quant.quantizer import Quantizer
from effml_quant.scales import decode_factor

__all__ = [
    "QTensor",
    "code_dtype",
    "packed_bits",
    "packed_shape",
    "packing_axis",
    "quantize",
    "scale_dtype",
    "stored_bytes",
]

_PRODUCTS = frozenset(
    {
        F.linear,
        F.embedding,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.einsum,
        Tensor.matmul,
        Tensor.mm,
        Tensor.bmm,
        Tensor.__matmul__,
        Tensor.__rmatmul__,
    }
)


def packed_bits(q: Quantizer) -> int:
    """Return the bits of a packed code: four, six (floats), or 8 where each has a byte."""
    bits = q.format.elem_bits
    return bits if bits == 4 or (bits == 6 and not q.format.is_integer) else 8


def packing_axis(q: Quantizer) -> int:
    """Return the axis that codes are packed along: the blocks' own, or the last."""
    return q.axis if isinstance(q.block, int) else -1


def packed_shape(shape: tuple[int, ...], q: Quantizer) -> tuple[int, ...]:
    """Return the shape of the packed codes of a tensor. A single number is not packed."""
    if not shape:
        return ()
    axis = packing_axis(q) % len(shape)
    return tuple(packed_length(n, packed_bits(q)) if a == axis else n for a, n in enumerate(shape))


def code_dtype(q: Quantizer) -> torch.dtype:
    """Return the dtype of unpacked codes."""
    return torch.uint8 if q.recipe == "asymmetric" else q.format.code_dtype


def scale_dtype(q: Quantizer, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the scales of a tensor that had `dtype`."""
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}.get(q.scale_kind, real)


def stored_bytes(shape: tuple[int, ...], q: Quantizer, dtype: torch.dtype) -> int:
    """Return the bytes of codes, scales, zero points and the tensor's scale; without a scale, of the elements alone."""
    if q.scale_kind == "none" or q.format.elem_bits > 8:
        return math.prod(shape) * -(-q.format.elem_bits // 8)
    blocks = math.prod(Blocks.cut(shape, q.axis, q.block).scales)
    size = scale_dtype(q, dtype).itemsize + (q.recipe == "asymmetric")
    total = 4 * (q.scale_kind == "e4m3" and q.recipe != "torchao")
    return math.prod(packed_shape(shape, q)) + blocks * size + total


@dataclass(frozen=True, eq=False, repr=False)
class QTensor:
    """Codes and scales of a tensor. Make one with `quantize`.

    Attributes:
        codes: uint8, packed along `packing_axis`, for four and six bits; else one code per element in float8_e4m3fn,
            float8_e5m2, int8 or uint8.
        scales: one per block, shaped like the tensor with each cut axis counting blocks: float8_e8m0fnu, float8_e4m3fn,
            float32 or float64.
        quantizer: how it was made.
        shape: of the tensor.
        dtype: of the tensor, and of what `dequantize` returns.
        global_scale: float32 scalar; NVFP4 only.
        zero_points: uint8, like scales; asymmetric integers only.

    Raises:
        ConfigError: shapes or dtypes do not fit one another.
    """

    codes: Tensor
    scales: Tensor
    quantizer: Quantizer
    shape: torch.Size
    dtype: torch.dtype
    global_scale: Tensor | None = None
    zero_points: Tensor | None = None

    def __post_init__(self) -> None:
        q = self.quantizer
        object.__setattr__(self, "shape", torch.Size(self.shape))
        if self.dtype not in FLOATS:
            raise ConfigError(f"dtype: got {self.dtype}, expected float16, bfloat16, float32 or float64")
        if q.scale_kind == "none" or q.format.elem_bits > 8:
            raise ConfigError(f"format: got {q.format.name}, expected one with a scale and codes of at most 8 bits")
        blocks = Blocks.cut(tuple(self.shape), q.axis, q.block).scales
        stored = code_dtype(q) if self._bits == 8 else torch.uint8
        wanted = [("codes", packed_shape(tuple(self.shape), q), stored), ("scales", blocks, scale_dtype(q, self.dtype))]
        wanted += [("zero_points", blocks, torch.uint8)] if q.recipe == "asymmetric" else []
        wanted += [("global_scale", (), torch.float32)] if self.global_scale is not None else []
        for name, shape, dtype in wanted:
            found = getattr(self, name)
            if not isinstance(found, Tensor) or tuple(found.shape) != shape or found.dtype != dtype:
                got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
                raise ConfigError(
                    f"{name}: got {got}, expected {dtype} {shape} for {q.format.name} {tuple(self.shape)}"
                )
        if self.global_scale is not None and q.scale_kind != "e4m3":
            raise ConfigError(f"global_scale: got one for {q.format.name}, expected None: only nvfp4 has it")
        if self.zero_points is not None and q.recipe != "asymmetric":
            raise ConfigError(f"zero_points: got some for recipe {q.recipe!r}, expected None")

    @property
    def _bits(self) -> int:
        return packed_bits(self.quantizer) if self.shape else 8

    @property
    def fmt(self) -> Format:
        return self.quantizer.format

    @property
    def axis(self) -> int:
        return self.quantizer.axis

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def numel(self) -> int:
        return self.shape.numel()

    def __repr__(self) -> str:
        return f"QTensor({self.fmt.name}, shape={tuple(self.shape)}, dtype={self.dtype}, nbytes={self.nbytes})"

    def tensors(self) -> dict[str, Tensor]:
        """Return its plain tensors by name, for buffers, a state dict or a file."""
        named = {
            "codes": self.codes,
            "scales": self.scales,
            "global_scale": self.global_scale,
            "zero_points": self.zero_points,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def replace_tensors(self, tensors: Mapping[str, Tensor]) -> QTensor:
        """Return a tensor made the same way of other plain tensors, such as those of a state dict.

        Raises:
            ConfigError: a name, shape or dtype is not that of this one.
        """
        if set(tensors) != set(self.tensors()):
            raise ConfigError(f"tensors: got {sorted(tensors)}, expected {sorted(self.tensors())}")
        return QTensor(quantizer=self.quantizer, shape=self.shape, dtype=self.dtype, **tensors)

    def to(self, device: torch.device | str) -> QTensor:
        """Return it on a device."""
        if isinstance(device, torch.dtype):
            raise ConfigError(f"device: got {device}, expected a device; for another dtype dequantize({device})")
        return self.replace_tensors({name: tensor.to(device) for name, tensor in self.tensors().items()})

    def unpack(self) -> Tensor:
        """Return one code per element, shaped like the tensor, in the format's `code_dtype` (asymmetric: uint8)."""
        if self._bits == 8:
            return self.codes
        axis = packing_axis(self.quantizer)
        codes = unpack_bits(self.codes, self._bits, self.shape[axis], axis)
        return signed(codes, self._bits) if code_dtype(self.quantizer) == torch.int8 else codes

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the tensor it stands for, in its own or another floating dtype, saturated to that one's range."""
        dtype = self.dtype if dtype is None else dtype
        if dtype not in FLOATS:
            raise ConfigError(f"dtype: got {dtype}, expected float16, bfloat16, float32 or float64")
        q = self.quantizer
        if self.numel() and self._fills_groups():
            factor = decode_factor(self.scales, q, self.global_scale).flatten()
            out = kernels.values_of(self.codes.flatten(), factor, q, tuple(self.shape), dtype)
            if out is not None:
                return out
        return dequantize_blocks(Codes(self.unpack(), self.scales, self.zero_points, self.global_scale), q, dtype)

    def _fills_groups(self) -> bool:
        """Say whether no byte of the codes is filled up at the end of a row."""
        return self._bits == 8 or self.codes.numel() * 8 == self.numel() * self._bits

    def __matmul__(self, other: Any) -> Tensor:
        return torch.matmul(self.dequantize(), other)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute products with the values; leave every other function to the one who dequantises first."""
        if func not in _PRODUCTS or isinstance((kwargs or {}).get("out"), QTensor):
            return NotImplemented
        return func(*_values(args), **{name: _values(value) for name, value in (kwargs or {}).items()})


def _values(x: Any) -> Any:
    if isinstance(x, tuple | list):
        return type(x)(map(_values, x))
    return x.dequantize() if isinstance(x, QTensor) else x


@torch.no_grad()
def quantize(
    x: Tensor,
    fmt: str | Format | Quantizer,
    *,
    generator: torch.Generator | None = None,
    global_scale: Tensor | float | None = None,
    **fields: Any,
) -> QTensor:
    """Quantise a tensor to packed codes and scales.

    Arguments are those of `fake_quantize`.

    Raises:
        ConfigError: an argument is unknown or does not fit the tensor, or the format has no scale (bfloat16).
        NonFiniteError: a value is NaN or infinite and `nonfinite="raise"`.

    >>> q = quantize(torch.tensor([0.95, -0.3, 0.01]), "mxfp4")
    >>> q.unpack().tolist(), q.scales.view(torch.uint8).tolist(), q.dequantize().tolist()
    ([7, 12, 0], [124], [0.75, -0.25, 0.0])
    """
    q = Quantizer.make(fmt, **fields)
    check_input(x, q)
    seed = draw_seed(q, generator, x.device)
    total = check_global_scale(global_scale, q, x.device)
    shape, bits, axis = tuple(x.shape), packed_bits(q) if x.ndim else 8, packing_axis(q)
    whole = math.prod(packed_shape(shape, q)) * 8 == x.numel() * bits  # no row ends within a byte
    if x.numel() and bits < 8 and whole:
        done = kernels.codes_of(x, q, seed, total, packed=True)
        if done is not None:
            codes, scales, total = done
            return QTensor(codes.view(packed_shape(shape, q)), scales, q, x.shape, x.dtype, total)
    done = kernels.codes_of(x, q, seed, total) if x.numel() else None
    made = quantize_blocks(x, q, seed, total) if done is None else Codes(done[0], done[1], None, done[2])
    codes = made.codes
    if bits < 8:
        codes = pack_bits(codes.view(torch.uint8) & ((1 << bits) - 1), bits, axis)
    else:
        codes = codes.view(code_dtype(q))
    return QTensor(codes, made.scales, q, x.shape, x.dtype, made.global_scale, made.zero_points)
