"""Casts on the CPU in one pass over memory, through the system's C compiler; without one, the plain version serves.

`cast.c` is built for this machine at first use, once per combination of types and rounding (see `effml_shared.native`).
Results equal the plain version's bit by bit. Cost per element: one read and one write, which is what bounds it.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from effml_shared.native import library
from torch import Tensor

from effml_quant.blocks import Blocks
from effml_quant.formats import Format
from effml_quant.kernels.lines import RUN, Lines
from effml_quant.quantizer import Quantizer
from effml_quant.rounding import ROUNDINGS
from effml_quant.scales import BlockScale, block_scale, carry, tensor_scale

__all__ = ["cast", "cast_both", "codes_of", "is_available", "values_of"]

_SOURCE = Path(__file__).with_name("cast.c")
_TYPES = {torch.float32: "FLOAT32", torch.bfloat16: "BFLOAT16"}
_LANES = 64  # as in cast.c
_ALONE = 1 << 17  # elements below which a second thread costs more than it gives


class _Cast(ctypes.Structure):
    """As in cast.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("outer", "length", "inner", "block")),
        *((name, ctypes.c_int32) for name in ("man_bits", "floor_bits", "emax", "step", "scale", "given_stride")),
        *((name, ctypes.c_int32) for name in ("code_shift", "code_man_bits", "code_bits")),
        *((name, ctypes.c_float) for name in ("largest", "bound", "min_normal", "per_spacing")),
        *((name, ctypes.c_float) for name in ("total", "total_sixth", "per_total")),
        *((name, ctypes.c_uint32) for name in ("seed_low", "seed_high")),
        *((name, ctypes.c_void_p) for name in ("encode", "decode", "real_scales", "scale_codes")),
    )


class _Decode(ctypes.Structure):
    """As in cast.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("length", "block")),
        ("bound", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("table", "decode")),
    )


def _items(lines: Lines) -> int:
    """Return the number of a kernel's items: see cast.c."""
    return lines.outer * -(-lines.length // lines.block) * -(-lines.inner // _LANES)


def is_available() -> bool:
    """Say whether this machine has a C compiler that builds the kernels."""
    defines = ("AMAX", "ROUNDING=NEAREST_EVEN", "DIVIDE=0", "INPUT=FLOAT32", "OUTPUT=FLOAT32", "BLOCK=32")
    return library(_SOURCE, defines) is not None


def _serves(x: Tensor, q: Quantizer) -> bool:
    """Say whether the kernels take this tensor and quantiser."""
    if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu" or x.dtype not in _TYPES or not x.numel():
        return False
    if not isinstance(q.block, int | str) or q.format.lowest != -q.format.max:
        return False
    if q.scale_kind == "float32" and q.recipe not in (None, "symmetric"):
        return False
    if q.scale_kind == "none" and q.format.exp_bits != 8:
        return False
    try:
        x.data_ptr()
    except RuntimeError:  # a tensor of functorch or of a tracer has no memory of its own
        return False
    return is_available()


def cast(
    x: Tensor,
    q: Quantizer,
    seed: Tensor | None = None,
    global_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    """Return what `plain_cast` returns, or None if it must do this one.

    Args:
        out: contiguous, like x; may be x itself. None: fresh memory.
    """
    if not _serves(x, q):
        return None
    x = x.detach().contiguous()
    out = torch.empty_like(x) if out is None else out
    name = _TYPES[x.dtype]
    if q.scale_kind == "none":
        spec = _spec(q, Lines(1, x.numel(), 1, 1), x.dtype, seed)
        return out if _run("ELEMENTWISE", q, 0, name, name, 0, (spec,), (x, out), x.numel(), x.numel()) else None
    lines = Lines.of(tuple(x.shape), q)
    spec, kept, _ = _prepare(x, q, lines, seed, global_scale)
    done = _run("CAST", q, _divides(q), name, name, lines.block, (spec,), (x, out), _items(lines), x.numel())
    del kept
    return out if done else None


def cast_both(x: Tensor, rows: Quantizer, columns: Quantizer) -> tuple[Tensor, Tensor] | None:
    """Return a matrix cast along its last and along its first axis, read once, or None if the plain version must."""
    simple = all(
        isinstance(q.block, int) and q.rounding == "rne" and q.scale_kind in ("e8m0", "float32") and q.block <= 4096
        for q in (rows, columns)
    )
    same = rows.scale_kind == columns.scale_kind
    if x.ndim != 2 or not simple or not same or not _serves(x, rows) or not _serves(x, columns):
        return None
    x, name = x.detach().contiguous(), _TYPES[x.dtype]
    outs = torch.empty_like(x), torch.empty_like(x)
    (m, n), block = x.shape, (rows.block, columns.block)
    assert isinstance(block[0], int)
    assert isinstance(block[1], int)
    specs = (
        _spec(rows, Lines(m, n, 1, block[0]), x.dtype, None),
        _spec(columns, Lines(1, m, n, block[1]), x.dtype, None),
    )
    tiles = -(-m // block[1])
    done = _run("CAST_BOTH", rows, _divides(rows), name, name, block[0], specs, (x, *outs), tiles, x.numel())
    return outs if done else None


def codes_of(
    x: Tensor, q: Quantizer, seed: Tensor | None = None, global_scale: Tensor | None = None, *, packed: bool = False
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return codes (uint8 or int8; if `packed`, flat bytes), scales and the tensor's scale; or None.

    Packing is for four- and six-bit codes whose blocks lie together and fill whole bytes.
    """
    if not _serves(x, q) or q.scale_kind == "none":
        return None
    lines, bits = Lines.of(tuple(x.shape), q), q.format.elem_bits
    output = "CODE"
    if packed:
        group = {4: 2, 6: 4 if not q.format.is_integer else None}.get(bits)
        if group is None or lines.inner != 1 or lines.length % group or lines.block % group:
            return None
        output = "NIBBLE" if bits == 4 else "SIXBIT"
    x = x.detach().contiguous()
    spec, kept, scale = _prepare(x, q, lines, seed, global_scale)
    shape = Blocks.cut(tuple(x.shape), q.axis, q.block).scales
    if scale is None:
        coded = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}.get(q.scale_kind)
        stored = torch.empty(shape, dtype=coded or torch.float32)
        setattr(spec, "scale_codes" if coded else "real_scales", stored.data_ptr())
    else:
        stored = scale.stored.reshape(shape)
    size = x.numel() * (bits if packed else 8) // 8
    codes = torch.empty(size, dtype=torch.uint8)
    name = _TYPES[x.dtype]
    done = _run("CAST", q, _divides(q), name, output, lines.block, (spec,), (x, codes), _items(lines), x.numel())
    total = kept[-1] if q.scale_kind == "e4m3" else None
    if not done:
        return None
    if not packed:
        codes = codes.view(torch.int8 if q.format.is_integer else torch.uint8).view(x.shape)
    return codes, stored, total


def values_of(codes: Tensor, decode: Tensor, q: Quantizer, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Return the values of codes (one per byte or packed, flat) whose blocks lie together, or None.

    Args:
        decode: float32 factor per block, flat.
    """
    fmt, count = q.format, math.prod(shape)
    if codes.device.type != "cpu" or dtype not in _TYPES or q.scale_kind == "none" or not count or not is_available():
        return None
    if not isinstance(q.block, int | str) or decode.dtype != torch.float32 or q.recipe == "asymmetric":
        return None
    lines = Lines.of(shape, q)
    if q.block == "tensor":
        decode = decode.expand(lines.blocks)
    packed = codes.numel() != count
    kind = {4: "NIBBLE", 6: "SIXBIT"}[fmt.elem_bits] if packed else "CODE"
    group = {"NIBBLE": 2, "SIXBIT": 4, "CODE": 1}[kind]
    if lines.inner != 1 or lines.length % group or lines.block % group or decode.numel() != lines.blocks:
        return None
    codes, decode = codes.contiguous().view(torch.uint8), decode.contiguous()
    table = _table(fmt, kind)
    spec = _Decode(
        length=lines.length,
        block=lines.block,
        bound=torch.finfo(dtype).max,
        table=table.data_ptr(),
        decode=decode.data_ptr(),
    )
    out = torch.empty(shape, dtype=dtype)
    items = lines.outer * -(-lines.length // lines.block)
    done = _run("DECODE", q, 0, kind, _TYPES[dtype], lines.block, (spec,), (codes, out), items, count)
    return out if done else None


@functools.cache
def _table(fmt: Format, kind: str) -> Tensor:
    """Return the float32 value of every byte; of every pair of codes, low nibble first."""
    values = fmt.values()
    if kind == "NIBBLE":
        byte = torch.arange(256)
        return torch.stack([values[byte & 15], values[byte >> 4]], 1).contiguous()
    if fmt.is_integer:  # a byte holds it sign-extended
        byte = torch.arange(256)
        return torch.where(byte < 128, byte, byte - 256) * fmt.spacing
    return values


def _divides(q: Quantizer) -> int:
    return int(q.scale_kind == "float32")


def _prepare(
    x: Tensor, q: Quantizer, lines: Lines, seed: Tensor | None, global_scale: Tensor | None
) -> tuple[_Cast, list[Any], BlockScale | None]:
    """Return the kernel's description, what must stay alive meanwhile, and the scales if they were made here."""
    spec = _spec(q, lines, x.dtype, seed)
    if q.scale_kind == "e4m3":
        if global_scale is None and q.recipe != "torchao":
            global_scale = tensor_scale(_largest(x, q, lines), q)
        total = torch.ones(()) if global_scale is None else global_scale.float().cpu()
        spec.total, spec.total_sixth, spec.per_total = (float(v) for v in (total, total * (1.0 / 6.0), 1.0 / total))
        return spec, [global_scale], None
    if q.block != "tensor":
        return spec, [], None  # the kernel makes its scales as it goes
    scale = block_scale(_amax(x, q, lines).amax().reshape(1), q)
    decode = scale.decode.contiguous()
    encode = decode if scale.encode is None else scale.encode.contiguous()
    spec.scale, spec.given_stride = 2, 0
    spec.encode, spec.decode = encode.data_ptr(), decode.data_ptr()
    return spec, [encode, decode], scale


def _amax(x: Tensor, q: Quantizer, lines: Lines) -> Tensor:
    """Return the largest magnitude of each block."""
    amax, spec = torch.empty(lines.blocks), _spec(q, lines, x.dtype, None)
    _run("AMAX", q, 0, _TYPES[x.dtype], "FLOAT32", 0, (spec,), (x, amax), _items(lines), x.numel())
    return amax


def _largest(x: Tensor, q: Quantizer, lines: Lines) -> Tensor:
    """Return the largest magnitude in blocks that are finite."""
    largest = _amax(x, q, Lines(1, x.numel(), 1, RUN)).amax()
    if largest.isfinite():
        return largest
    amax = _amax(x, q, lines)
    return torch.where(amax.isfinite(), amax, 0.0).amax()


def _spec(q: Quantizer, lines: Lines, dtype: torch.dtype, seed: Tensor | None) -> _Cast:
    fmt, spare = q.format, 2 if q.format.is_integer else 0
    number = 0 if seed is None else int(seed)
    return _Cast(
        *lines,
        man_bits=fmt.man_bits + spare,
        floor_bits=(fmt.emin + spare + 127) << 23,
        emax=fmt.emax,
        step=carry(q, 23),
        scale={"e8m0": 0, "float32": 1, "e4m3": 4 if q.recipe == "torchao" else 3, "none": 2}[q.scale_kind],
        given_stride=1,
        code_shift=0 if fmt.is_integer else (127 - fmt.bias) << fmt.man_bits,
        code_man_bits=fmt.man_bits,
        code_bits=fmt.elem_bits,
        largest=fmt.max,
        bound=torch.finfo(dtype).max,
        min_normal=fmt.min_normal,
        per_spacing=1 / fmt.spacing,
        seed_low=number & 0xFFFFFFFF,
        seed_high=number >> 32 & 0xFFFFFFFF,
    )


def _run(
    kernel: str,
    q: Quantizer,
    divide: int,
    source: str,
    target: str,
    block: int,
    specs: tuple[ctypes.Structure, ...],
    tensors: tuple[Tensor, ...],
    items: int,
    elements: int,
) -> bool:
    """Run a kernel over all its items on torch's number of threads; False if it cannot be built."""
    rounding = ("NEAREST_EVEN", "NEAREST_AWAY", "TOWARD_ZERO", "STOCHASTIC")[ROUNDINGS.index(q.rounding)]
    names = {"ROUNDING": rounding, "DIVIDE": divide, "INPUT": source, "OUTPUT": target}
    names["BLOCK"] = block if block in (16, 32, 64, 128) else 32
    built = library(_SOURCE, (kernel, *(f"{name}={value}" for name, value in names.items())))
    if built is None:
        return False
    function = built.kernel
    head = [ctypes.byref(spec) for spec in specs] + [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    threads = min(torch.get_num_threads(), items, max(1, elements // _ALONE))
    bounds = [items * i // threads for i in range(threads + 1)]
    parts = [(*head, ctypes.c_int64(a), ctypes.c_int64(b)) for a, b in itertools.pairwise(bounds)]
    waiting = [_pool(os.getpid()).submit(function, *part) for part in parts[1:]]
    function(*parts[0])
    for future in waiting:
        future.result()
    return True


@functools.lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    """Return this process's threads: a forked child has none of its parent's."""
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="effml-cast")
