"""float32 matrix products on CPUs where PyTorch's default library is not the faster one at hand.

PyTorch multiplies float32 matrices on a CPU with MKL. On AMD's processors oneDNN, which the same PyTorch holds for
other types, is up to 2.4 times as fast: 228 against 95 GFLOP/s on one core of Zen 5 for (4096, 512) @ (512, 128).
`matmul` takes oneDNN there and PyTorch's own product elsewhere, and within `fast_products` every `mm` and `addmm` of
PyTorch does, those of `nn.Linear` forward and backward above all. The choice is by the processor's maker, not by
timing, so that results on one machine are the same from run to run; they differ from the other library's by rounding.

oneDNN reads a row-major left matrix; another one is copied, or its product's transpose computed, whichever moves less.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["fast_products", "matmul", "prefers_onednn"]

_SMALLEST = 1 << 18  # multiplications; below, the call costs more than the product
_lock = threading.Lock()
_users = 0
_library: Any = None


@functools.cache
def prefers_onednn() -> bool:
    """Say whether float32 products on this machine's CPU are oneDNN's: an AMD processor, and a PyTorch with both."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    with contextlib.suppress(OSError):
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    return "AMD" in platform.processor()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return a (rows, depth) @ b (depth, columns); for float32 on a CPU by the faster library. Not differentiable."""
    fits = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0] and a.numel() * b.shape[1] >= _SMALLEST
    plain = a.dtype == b.dtype == torch.float32 and a.device.type == b.device.type == "cpu"
    if not fits or not plain or not prefers_onednn():
        return torch.mm(a, b, out=a.new_empty(0))  # this form is never replaced
    if a.is_contiguous():
        return _onednn(a, b)
    if b.t().is_contiguous() or b.numel() < a.numel():
        return _onednn(b.t().contiguous(), a.t()).t().contiguous()
    return _onednn(a.contiguous(), b)


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = matmul(a, b)
    return torch.add(bias if beta == 1 else beta * bias, product, alpha=alpha)


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Let PyTorch's products of two matrices be `matmul` for a while, in all threads; nothing changes off AMD's CPUs.

    >>> layer, x = torch.nn.Linear(64, 64), torch.randn(64, 64)
    >>> with fast_products():
    ...     y = layer(x)
    >>> torch.allclose(y, layer(x), atol=1e-5)
    True
    """
    global _users, _library
    if not prefers_onednn():
        yield
        return
    with _lock:
        _users += 1
        if _users == 1:
            _library = torch.library.Library("aten", "IMPL")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that a kernel is overridden
                _library.impl("mm", matmul, "CPU")
                _library.impl("addmm", _addmm, "CPU")
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _library._destroy()
                _library = None
