"""One recurrent layer, forward and backward: the tiled algorithm, autograd through the naive loop, a standard layer.

    python packages/effml-arch/benchmarks/bench_recurrent.py --table
    python packages/effml-arch/benchmarks/bench_recurrent.py --lengths 512 1024 --samples 5

One JSON line per case on stdout. Before anything is timed, output and gradients of both backends are compared in
float64 at a length of 128; `equal` means to 1e-11. Medians, same inputs and process. `peak_mib` is what one pass adds
to the resident memory of a process of its own (one per contender and length, after a warm-up at a length of 16).
`growth` is the time over that of the length before.

The package recurrent-transformer-pytorch of lucidrains is timed as well if it is installed: one layer of these sizes in
its tiled mode, with gates, value MLP, positions and the recurrence within blocks switched off. Time and memory only,
since its layer is another one: it makes persistent pairs before the feed-forward network, a GEGLU of as many weights,
and differentiates through the tiles by autograd.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from effml_arch import RecurrentTransformerConfig
from effml_arch.recurrent.layer import RecurrentTransformerLayer
from effml_shared.layers import Block, Context

KEYS = ("length", "contender", "seconds", "growth", "peak_mib", "tiled_is_faster", "memory_over_tiled")
AUTOGRAD = ("naive", "lucidrains")  # differentiated step by step, slow and large
SIZES: dict[str, Any] = {"n_layers": 1, "d_model": 64, "n_heads": 4, "d_ff": 256, "mlp": "gelu", "position": "alibi"}


class Lucidrains(torch.nn.Module):
    """A layer of recurrent-transformer-pytorch, x (batch, seq, d_model) to an output of that shape."""

    def __init__(self) -> None:
        from recurrent_transformer import RecurrentTransformer

        super().__init__()
        plain = {"attn_gate": False, "use_value_mlp": False, "use_intra_block_rnn": False, "rel_pos_bias": False}
        width, heads = SIZES["d_model"], SIZES["n_heads"]
        sizes = {"num_tokens": 2, "dim": width, "depth": 1, "dim_head": width // heads, "heads": heads}
        model = RecurrentTransformer(**sizes, ff_expansion=SIZES["d_ff"] / width, recurrent=True, **plain)
        self.attention, self.feed_forward = model.layers[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention.forward_tiled_recurrent(x)
        return x + self.feed_forward(x)


def make(contender: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return one layer; equal weights whoever asks."""
    torch.manual_seed(0)
    if contender == "lucidrains":
        return Lucidrains()
    config = RecurrentTransformerConfig(**SIZES, backend="naive" if contender == "naive" else "tiled")
    layer = Block(config, 0) if contender == "standard" else RecurrentTransformerLayer(config, 0)
    return layer.to(dtype)


def passes(contender: str, layer: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Run forward and backward; return the output and all gradients."""
    if contender == "standard":
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
        z = layer(x, Context(mask=mask))
    else:
        z = layer(x)
    gradients = torch.autograd.grad(z.square().mean(), [x, *layer.parameters()])
    return [z.detach(), *gradients]


def inputs(length: int, batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    stream = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, SIZES["d_model"], generator=stream, dtype=dtype).requires_grad_()


def check() -> bool:
    """Say whether both backends agree in float64."""
    x = inputs(128, 2, torch.float64)
    pairs = zip(*(passes(name, make(name, torch.float64), x) for name in ("tiled", "naive")), strict=True)
    return all(float((a - b).norm()) <= 1e-11 * max(1.0, float(b.norm())) for a, b in pairs)


def peak(contender: str, length: int, batch: int) -> float:
    """Return the MiB that one pass adds to a process of its own."""
    command = [sys.executable, __file__, "--measure", contender, "--lengths", str(length), "--batch", str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(contender: str, length: int, batch: int) -> None:
    layer = make(contender)
    passes(contender, layer, inputs(16, batch))
    x = inputs(length, batch)
    before = high_water()
    passes(contender, layer, x)
    print(high_water() - before)


def high_water() -> float:
    """Return the largest resident memory of this process so far, in MiB (Linux only: getrusage knows the parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--naive-up-to", type=int, default=2048, help="that, and lucidrains, hold much memory")
    parser.add_argument("--naive-samples", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="a table on stderr")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        measure(options.measure, options.lengths[0], options.batch)
        return
    versions = {"torch": torch.__version__}
    contenders = ["tiled", "standard", "naive"]
    if importlib.util.find_spec("recurrent_transformer"):
        contenders.insert(2, "lucidrains")
        versions["lucidrains"] = importlib.metadata.version("recurrent-transformer-pytorch")
    print(json.dumps({**versions, "equal": check(), **vars(options), **SIZES}), flush=True)
    rows: list[dict[str, Any]] = []
    last: dict[str, float] = {}
    for length in options.lengths:
        x, found = inputs(length, options.batch), {}
        for name in contenders:
            if name in AUTOGRAD and length > options.naive_up_to:
                continue
            layer, seconds = make(name), []
            slow = name in AUTOGRAD
            for turn in range((options.naive_samples if slow else options.samples) + (not slow)):
                gc.collect()
                start = time.perf_counter()
                passes(name, layer, x)
                if turn or slow:  # the first of the others is the warm-up
                    seconds.append(time.perf_counter() - start)
            found[name] = (seconds, peak(name, length, options.batch))
        for name, (seconds, mib) in found.items():
            median = statistics.median(seconds)
            row = {
                "length": length,
                "contender": name,
                "seconds": round(median, 4),
                "seconds_all": [round(value, 4) for value in seconds],
                "growth": round(median / last[name], 2) if name in last else None,
                "peak_mib": round(mib, 1),
                "tiled_is_faster": round(median / statistics.median(found["tiled"][0]), 2),
                "memory_over_tiled": round(mib / found["tiled"][1], 1) if found["tiled"][1] else None,
            }
            last[name] = median
            rows.append(row)
            print(json.dumps(row), flush=True)
    if options.table:
        cells = [list(KEYS), *([str(row[key]) for key in KEYS] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        for line in cells:
            text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            print(text.rstrip(), file=sys.stderr)


if __name__ == "__main__":
    main()
