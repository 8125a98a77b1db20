"""One linear layer forward and backward in a precision scheme, against an emulation in many passes and plain layers.

    python packages/effml-quant/benchmarks/bench_linear.py --table

One JSON line per case on stdout. All contenders take the same input, weight and output gradient, in turns; medians.
Before timing, output and both gradients of the emulation (which quantises by whole-tensor float32 passes, in the manner
of microxcaling: see bench_cast.py) must equal ours bit by bit: same operands, same products.

`over_linear` is the cost of the scheme: this contender's time over that of `nn.Linear` in float32, whose three products
every contender but bfloat16 multiplies too. Six quantised copies (X, W and G, each along two axes) are what lies
between; `limit_ms` adds to the float32 layer the time of copying these six.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from bench_cast import emulated
from effml_quant import PrecisionScheme, Quantizer
from effml_quant.precision.linear import MXLinear
from effml_shared.benchmarks import in_turn, publish, settings
from torch import Tensor

KEYS = ("format", "tokens", "width", "contender", "ms", "over_linear", "limit_ms", "ours_is_faster", "equal")


class EmulatedLinear(torch.autograd.Function):
    """The same layer, every operand quantised by `emulated`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, q: Quantizer) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.q = q
        return emulated(x, q) @ emulated(weight, q).t()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        (x, weight), q = ctx.saved_tensors, ctx.q

        def across(t: Tensor) -> Tensor:
            return emulated(t.t().contiguous(), q).t()

        return emulated(g, q) @ across(weight), across(g).t() @ across(x), None


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per contender and case."""
    stream = torch.Generator().manual_seed(0)
    for tokens, width in options.shapes:
        x = torch.randn(tokens, width, generator=stream).requires_grad_()
        weight = (torch.randn(width, width, generator=stream) / width**0.5).requires_grad_()
        g = torch.randn(tokens, width, generator=stream)
        there = [torch.empty_like(t) for t in (x, weight, g)]
        narrow_g = g.bfloat16()
        narrow = [t.detach().bfloat16().requires_grad_() for t in (x, weight)]
        for fmt in options.formats:
            q = Quantizer(fmt)
            layer = MXLinear(width, width, bias=False, scheme=PrecisionScheme.mx(fmt, vector=None))
            layer.weight = torch.nn.Parameter(weight.detach().clone())

            def run(y: Tensor, *leaves: Tensor, gradient: Tensor = g) -> list[Tensor]:
                return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]

            def ours(layer: MXLinear = layer, x: Tensor = x) -> list[Tensor]:
                return run(layer(x), x, layer.weight)

            def theirs(q: Quantizer = q, x: Tensor = x, weight: Tensor = weight) -> list[Tensor]:
                return run(EmulatedLinear.apply(x, weight, q), x, weight)

            contenders: dict[str, Callable[[], Any]] = {
                "nn.Linear": lambda x=x, weight=weight: run(F.linear(x, weight), x, weight),
                "nn.Linear bfloat16": lambda n=narrow, g=narrow_g: run(F.linear(*n), *n, gradient=g),
                "six copies": lambda x=x, weight=weight, g=g, there=there: [
                    to.copy_(t) for to, t in zip(there, (x.detach(), weight.detach(), g), strict=True) for _ in range(2)
                ],
                "ours": ours,
                "emulation": theirs,
            }
            equal = {"emulation": all(map(torch.equal, ours(), theirs()))}
            times = in_turn(contenders, options.samples)
            medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
            for name, ms in medians.items():
                yield {
                    "format": fmt,
                    "tokens": tokens,
                    "width": width,
                    "contender": name,
                    "ms": round(ms, 2),
                    "over_linear": round(ms / medians["nn.Linear"], 2),
                    "limit_ms": round(medians["nn.Linear"] + medians["six copies"], 2),
                    "ours_is_faster": round(ms / medians["ours"], 2),
                    "equal": equal.get(name, True),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=["mxfp8_e4m3", "mxfp4"])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="a table on stderr")
    options = parser.parse_args()
    options.shapes = [(2048, 512), (4096, 1024)]
    torch.set_num_threads(options.threads)
    publish(settings(options), cases(options), KEYS, table=options.table)


if __name__ == "__main__":
    main()
