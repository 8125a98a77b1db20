"""What benchmarks share: what a run is measured with, contenders in turn, memory in a fresh process, cases as JSON.

A benchmark prints one JSON line with its settings, then one per case, all on stdout; what people read is on stderr.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch

from effml_shared.errors import ConfigError
from effml_shared.runs import describe_machine

__all__ = ["high_water", "in_fresh_process", "in_turn", "publish", "say", "seconds", "settings"]

T = TypeVar("T")

_OF_THE_OUTPUT = ("table",)  # options that change nothing that is measured


def settings(options: argparse.Namespace, *peers: str) -> dict[str, Any]:
    """Return what a benchmark measures with, for the first line of its run: machine, versions, commit, options.

    Options that are paths leave their names only, so that nothing of a machine's folders is printed.

    Args:
        options: those of the command line.
        peers: distributions that take part if they are installed.
    """
    described = describe_machine()
    versions, machine = described["versions"], described["machine"]
    found: dict[str, Any] = {
        "bench": Path(sys.argv[0]).stem,
        "torch": versions["torch"],
        "versions": versions | _installed(peers),
        "cpu": machine["cpu"],
        "cpu_model": _cpu_model(),
        "gpu": machine["gpu"],
        "threads": machine["threads"],
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "started": described["started"],
        "git": described["git"],
    }
    plain = {name: _plain(value) for name, value in vars(options).items() if name not in _OF_THE_OUTPUT}
    return {name: value for name, value in (found | plain).items() if value is not None}


def publish(
    head: Mapping[str, Any], rows: Iterable[dict[str, Any]], keys: Sequence[str], *, table: bool
) -> list[dict[str, Any]]:
    """Print settings, then each row as JSON when it comes, and after the last a table of some fields on stderr."""
    print(json.dumps(head), flush=True)
    found = []
    for row in rows:
        found.append(row)
        print(json.dumps(row), flush=True)
    if table:
        cells = [list(keys), *([_cell(row.get(key)) for key in keys] for row in found)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return found


def say(text: str) -> None:
    """Print for people: stdout is for JSON."""
    print(text, file=sys.stderr, flush=True)


def seconds(work: Callable[[], Any], device: str = "cpu") -> float:
    """Return the time that some work takes."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def in_turn(
    contenders: Mapping[str, Callable[[], Any]], samples: int, *, warm_up: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Return the seconds of every sample of each contender; they take turns, Python's garbage collected before each.

    Args:
        contenders: work by name.
        samples: timed turns.
        warm_up: turns before them, which are not timed.
        device: of the work.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + samples):
        for name, work in contenders.items():
            gc.collect()
            spent = seconds(work, device)
            if turn >= warm_up:
                times[name].append(spent)
    return times


def in_fresh_process(work: Callable[..., T], *arguments: Any) -> T:
    """Return what a module's function returns in a process of its own, with as many threads as here."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, torch.set_num_threads, (torch.get_num_threads(),)) as processes:
        return processes.submit(work, *arguments).result()


def high_water(device: str = "cpu") -> float:
    """Return the most memory that this process has used so far, in MiB: resident, or allocated on a GPU.

    Raises:
        ConfigError: a system other than Linux, whose other ways also know of the process that started this one.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with suppress(OSError):
        if peak := re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()):
            return int(peak[1]) / 1024
    raise ConfigError(f"peak memory: got a system ({sys.platform}) that does not tell it, expected Linux")


def _installed(names: Iterable[str]) -> dict[str, str]:
    found = {}
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _cpu_model() -> str | None:
    """Return family and model of the first processor: virtual machines often give no more than its maker's name."""
    with suppress(OSError):
        info = Path("/proc/cpuinfo").read_text()
        numbers = [re.search(rf"^{name}\s*: (\d+)$", info, re.MULTILINE) for name in ("cpu family", "model")]
        if all(numbers):
            return "family {}, model {}".format(*(number[1] for number in numbers if number))
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return value.name
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return str(value)
