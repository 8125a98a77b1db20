"""What this machine can do for a training run: measured, not read off a data sheet."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import statistics
import time

import torch

__all__ = ["examine"]

_OPTIONAL = {"datasets": "effml-shared[data]", "tokenizers": "effml-shared[data]", "transformers": "effml-optim[hf]"}


def examine() -> list[dict[str, str]]:
    """Return rows of `what`, `finding` and `remark`."""
    devices = [torch.device("cpu")] + ([torch.device("cuda")] if torch.cuda.is_available() else [])
    rows = [_row("python", platform.python_version()), _row("torch", torch.__version__)]
    rows.append(_row("CPU threads", str(torch.get_num_threads()), f"of {os.cpu_count()} cores"))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows.append(_row("GPU", gpu, "" if gpu != "none" else "presets `smoke` and `cpu` need none"))
    for device in devices:
        single, half = (_matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16))
        rows.append(_row(f"matrix product, {device.type} float32", f"{single / 1e9:,.0f} GFLOP/s"))
        remark = f"{half / single:.1f} x float32" + ("" if half > 1.1 * single else ": not worth it here")
        rows.append(_row(f"matrix product, {device.type} bfloat16", f"{half / 1e9:,.0f} GFLOP/s", remark))
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"])), None)
    rows.append(
        _row(
            "C++ compiler",
            compiler or "none",
            "torch.compile on CPU" if compiler else "torch.compile on CPU is left out",
        )
    )
    triton = importlib.util.find_spec("triton") is not None
    rows.append(_row("Triton", "installed" if triton else "not installed", "used on a GPU only"))
    ours = sorted({d.name for d in importlib.metadata.distributions() if d.name.startswith("effml-")})
    for name in [*ours, *_OPTIONAL]:
        try:
            rows.append(_row(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append(_row(name, "not installed", f"pip install '{_OPTIONAL[name]}'"))
    return rows


def _row(what: str, finding: str, remark: str = "") -> dict[str, str]:
    return {"what": what, "finding": finding, "remark": remark}


def _matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return FLOP/s of a matrix product (median of 5), on random data, small enough to take milliseconds."""
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(7):
        start = time.perf_counter()
        result = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    del result
    return 2 * size**3 / statistics.median(times[2:])
