"""The kernels of `sparse_rows.c` on the CPU: which tensors they take, and their calls on torch's number of threads.

Built at first use for this machine (see `effml_shared.native`), once per type (float32, float64). Each thread does its
own rows of the result, so that results do not depend on how many there are. With several threads, torch's own keep
their cores busy for some milliseconds after each product, unless `OMP_WAIT_POLICY=PASSIVE` stands in the environment.
"""

from __future__ import annotations

import ctypes
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from effml_shared.native import library
from torch import Tensor

__all__ = ["empty", "run", "serves"]

_SOURCE = Path(__file__).with_name("sparse_rows.c")


def serves(*tensors: Tensor) -> bool:
    """Say whether the kernels take these tensors: plain ones on the CPU, all float32 or all float64."""
    dtype = tensors[0].dtype
    if dtype not in (torch.float32, torch.float64):
        return False
    for tensor in tensors:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu" or tensor.dtype != dtype:
            return False
        try:
            tensor.data_ptr()
        except RuntimeError:  # a tensor of functorch or of a tracer has no memory of its own
            return False
    return _library(dtype) is not None


def run(kernel: str, dtype: torch.dtype, items: int | None, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel with its arguments, in their order: int64, pointers and double.

    Args:
        items: how many rows of the result the threads share; None: the kernel does not divide its work.
    """
    function = getattr(_library(dtype), kernel)
    values: list[Any] = [_argument(argument, kernel) for argument in arguments]
    if items is None:
        function(*values)
        return
    threads = max(1, min(torch.get_num_threads(), items))
    bounds = [ctypes.c_int64(items * i // threads) for i in range(threads + 1)]
    parts = list(itertools.pairwise(bounds))
    waiting = [_pool(os.getpid()).submit(function, *part, *values) for part in parts[1:]]
    function(*parts[0], *values)
    for future in waiting:
        future.result()


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return memory for a kernel to write, in large pages where the system has them: its first use costs less then."""
    out = torch.empty(shape, dtype=dtype)
    if out.numel():
        run("use_large_pages", torch.float32, None, out, out.numel() * out.element_size())
    return out


def _argument(value: Tensor | int | float | None, kernel: str) -> object:
    if isinstance(value, Tensor):
        if not value.is_contiguous():  # an address alone would be read as if it were
            raise RuntimeError(f"{kernel}: got a tensor that is not contiguous")
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_double(value)
    return ctypes.c_void_p(None) if value is None else ctypes.c_int64(value)


def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    return library(_SOURCE, ("FLOAT64",) if dtype == torch.float64 else (), fused=True)


@lru_cache(maxsize=1)
def _pool(pid: int) -> ThreadPoolExecutor:
    """Return this process's threads: a forked child has none of its parent's."""
    return ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="effml-sae")
