"""The penalty's gradient on the CPU in one sweep, through the system's C compiler; without one, torch serves.

About 1 ns per weight and thread against 5 for some twenty operations of torch. `penalty.c` is built at first use, once
for integers and once for floats, and kept in the user's cache directory, as the casts are.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from effml_shared.native import library
from torch import Tensor

from effml_quant.lotion.variance import is_continuous, snap_tolerance
from effml_quant.quantizer import Quantizer

__all__ = ["add_gradient", "is_available"]

_SOURCE = Path(__file__).with_name("penalty.c")


class _Penalty(ctypes.Structure):
    """As in penalty.c."""

    _fields_ = (
        ("length", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("man_bits", "floor_bits", "ceiling_bits", "through_scale")),
        *((name, ctypes.c_float) for name in ("largest", "spacing", "snap", "strength")),
    )


def is_available() -> bool:
    """Say whether this machine has a C compiler that builds the kernel."""
    return _library(floats=False) is not None


def add_gradient(
    w: Tensor, g: Tensor, out: Tensor, q: Quantizer, strength: float, through_scale: bool
) -> Tensor | None:
    """Add the gradient to `out` and return R of each block in float64, or None where torch must serve.

    Args:
        w, g, out: (blocks, length).
    """
    tensors = (w, g, out)
    plain = all(type(x) is Tensor and x.dtype == torch.float32 and x.device.type == "cpu" for x in tensors)
    if not plain or not is_continuous(q) or not out.is_contiguous() or torch.compiler.is_compiling():
        return None
    fmt = q.format
    built = _library(floats=not fmt.is_integer)
    if built is None:
        return None
    w, g = w.contiguous(), g.contiguous()
    spec = _Penalty(
        length=w.shape[1],
        man_bits=fmt.man_bits,
        floor_bits=(fmt.emin + 127) << 23,
        ceiling_bits=(fmt.emax + 127) << 23,
        through_scale=through_scale,
        largest=fmt.max,
        spacing=fmt.spacing,
        snap=snap_tolerance(fmt),
        strength=strength,
    )
    values = torch.empty(len(w), dtype=torch.float64)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (w, g, out, values)]
    built.kernel(ctypes.byref(spec), *pointers, ctypes.c_int64(0), ctypes.c_int64(len(w)))
    return values


def _library(*, floats: bool) -> ctypes.CDLL | None:
    return library(_SOURCE, (f"FLOATS={int(floats)}",))
