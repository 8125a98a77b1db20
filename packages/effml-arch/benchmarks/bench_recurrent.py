"""One recurrent layer, forward and backward: the tiled algorithm, autograd through the naive loop, standard layers.

    python packages/effml-arch/benchmarks/bench_recurrent.py --table
    python packages/effml-arch/benchmarks/bench_recurrent.py --lengths 512 1024 --samples 5

One JSON line per case on stdout. Before anything is timed, output and gradients of both backends are compared in
float64 at a length of 128; `equal` means to 1e-11. Medians, same inputs and process. `peak_mib` is what one pass adds
to the resident memory of a process of its own (one per contender and length, after a warm-up at a length of 16).
`growth` is the time over that of the length before.

`standard` is PyTorch's attention under a boolean mask, as documents and windows need it, which computes all pairs;
`causal` the same layer under PyTorch's causal flag, which skips half of them.

The package recurrent-transformer-pytorch of lucidrains is timed as well if it is installed: one layer of these sizes in
its tiled mode, with gates, value MLP, positions and the recurrence within blocks switched off. Time and memory only,
since its layer is another one: it makes persistent pairs before the feed-forward network, a GEGLU of as many weights,
and differentiates through the tiles by autograd.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from effml_arch import RecurrentTransformerConfig
from effml_arch.recurrent.layer import RecurrentTransformerLayer
from effml_shared.benchmarks import high_water, in_fresh_process, in_turn, publish, settings
from effml_shared.layers import Block, Context

KEYS = ("length", "contender", "seconds", "growth", "peak_mib", "tiled_is_faster", "memory_over_tiled")
STANDARD = ("standard", "causal")
AUTOGRAD = ("naive", "lucidrains")  # differentiated step by step, slow and large
LUCIDRAINS = "recurrent-transformer-pytorch"
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
    layer = Block(config, 0) if contender in STANDARD else RecurrentTransformerLayer(config, 0)
    return layer.to(dtype)


def passes(contender: str, layer: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Run forward and backward; return the output and all gradients."""
    if contender == "standard":
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
        z = layer(x, Context(mask=mask))
    elif contender == "causal":
        z = layer(x, Context())
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


def added_memory(contender: str, length: int, batch: int) -> float:
    """Return the MiB that one pass adds to this process."""
    layer = make(contender)
    passes(contender, layer, inputs(16, batch))
    x = inputs(length, batch)
    before = high_water()
    passes(contender, layer, x)
    return high_water() - before


def cases(contenders: Sequence[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per length and contender."""
    last: dict[str, float] = {}
    for length in options.lengths:
        x = inputs(length, options.batch)
        layers = {name: make(name) for name in contenders if name not in AUTOGRAD or length <= options.naive_up_to}

        def timed(names: Iterable[str], samples: int, warm_up: int, x: Any = x, layers: Any = layers) -> Any:
            return in_turn({name: partial(passes, name, layers[name], x) for name in names}, samples, warm_up=warm_up)

        seconds = timed([name for name in layers if name not in AUTOGRAD], options.samples, 1)
        seconds |= timed([name for name in layers if name in AUTOGRAD], options.naive_samples, 0)
        mib = {name: in_fresh_process(added_memory, name, length, options.batch) for name in seconds}
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, median in medians.items():
            yield {
                "length": length,
                "contender": name,
                "seconds": round(median, 4),
                "seconds_all": [round(value, 4) for value in seconds[name]],
                "growth": round(median / last[name], 2) if name in last else None,
                "peak_mib": round(mib[name], 1),
                "tiled_is_faster": round(median / medians["tiled"], 2),
                "memory_over_tiled": round(mib[name] / mib["tiled"], 1) if mib["tiled"] else None,
            }
        last = medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--naive-up-to", type=int, default=2048, help="that, and lucidrains, hold much memory")
    parser.add_argument("--naive-samples", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="a table on stderr")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    contenders = ["tiled", *STANDARD, "naive"]
    if importlib.util.find_spec("recurrent_transformer"):
        contenders.append("lucidrains")
    head = {**settings(options, LUCIDRAINS), "equal": check(), **SIZES}
    publish(head, cases(contenders, options), KEYS, table=options.table)


if __name__ == "__main__":
    main()
