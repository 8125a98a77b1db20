"""Decoding by low confidence: the vectorised sampler against the public per-row loop, and against the forward pass.

    python packages/effml-diffusion/benchmarks/bench_samplers.py --table
    python packages/effml-diffusion/benchmarks/bench_samplers.py --stubs 4x32x500 --networks --steps 8 --samples 2

One JSON line per case on stdout. `stub`: a model that costs nothing (it returns one tensor of logits), so that only the
samplers are timed. `transformer`: the baseline decoder, bidirectional. The loop is written here from the description of
the algorithm in LLaDA's public code: softmax and argmax at every position, then a top-k in Python for every row; above
temperature 0, Gumbel noise in float64 for every logit. A quarter of each row is given. At temperature 0 both must give
the same ids (`equal`, checked in float64).

Medians; same logits, process and number of forward passes, contenders in turn. `times_faster` is over the loop.
`over_forward` is the time beyond that of as many plain forward passes, as a share of it; negative where the sampler
saves work of the network's head. `over_limit` is over one read of the competing logits, at the bandwidth of a sum.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_diffusion.samplers import Confidence
from effml_shared.benchmarks import in_turn, publish, settings
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor

KEYS = ("model", "contender", "temperature", "seconds", "times_faster", "over_forward", "over_limit", "equal")


SHAPES = "batch x length x vocabulary, such as 8x256x32000"


class Stub:
    """Return the same logits (batch, seq, vocab) whatever is asked."""

    def __init__(self, batch: int, length: int, vocab: int, device: str) -> None:
        stream = torch.Generator(device).manual_seed(0)
        self.logits = torch.randn(batch, length, vocab, generator=stream, device=device)

    def __call__(self, ids: Tensor) -> Tensor:
        return self.logits


@torch.no_grad()
def public_loop(model: Callable[..., Any], init: Tensor, mask_id: int, steps: int, temperature: float) -> Tensor:
    """Decode as LLaDA's low-confidence remasking does, for one block and equal numbers of masks in every row."""
    ids = init.clone()
    masks = int((init == mask_id).sum(1)[0])
    counts = torch.full((len(init), steps), masks // steps)
    counts[:, : masks % steps] += 1
    for step in range(steps):
        masked = ids == mask_id
        output = model(ids)
        logits = output if isinstance(output, Tensor) else output.logits
        noisy = logits
        if temperature > 0:
            wide = logits.double()
            noisy = wide.exp() / (-torch.log(torch.rand_like(wide))) ** temperature
        tokens = noisy.argmax(-1)
        confidence = logits.softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        tokens = torch.where(masked, tokens, ids)
        confidence = torch.where(masked, confidence, -torch.inf)
        chosen = torch.zeros_like(masked)
        for row in range(len(ids)):
            _, best = torch.topk(confidence[row], k=int(counts[row, step]))
            chosen[row, best] = True
        ids[chosen] = tokens[chosen]
    return ids


def shape(text: str) -> tuple[int, int, int]:
    """Return batch, length and vocabulary of `8x256x32000`."""
    batch, length, vocab = map(int, text.split("x"))
    return batch, length, vocab


def network(vocab: int, options: argparse.Namespace) -> Transformer:
    config = TransformerConfig(
        vocab_size=vocab,
        n_layers=options.layers,
        d_model=options.width,
        n_heads=max(1, options.width // 64),
        d_ff=4 * options.width,
        causal=False,
    )
    return Transformer(config).to(options.device).eval()


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per model, temperature and contender."""
    for size in options.stubs:
        for temperature in options.temperatures:
            yield from measure("stub", Stub(*size, options.device), size, temperature, options)
    for size in options.networks:
        model = network(size[-1], options)
        for temperature in options.temperatures:
            yield from measure("transformer", model, size, temperature, options)


def contenders_on(
    model: Any, mask_id: int, init: Tensor, steps: int, temperature: float
) -> dict[str, Callable[[], Tensor]]:
    def never_the_mask(ids: Tensor) -> Tensor:  # the public code relies on models that never predict it
        output = model(ids)
        logits = output if isinstance(output, Tensor) else output.logits
        logits[..., mask_id] = -torch.inf
        return logits

    diffusion, sampler = MaskedDiffusion(model, mask_id), Confidence("prob", steps=steps, temperature=temperature)
    return {
        "effml": lambda: sampler(diffusion, init).ids,
        "loop": lambda: public_loop(never_the_mask, init, mask_id, steps, temperature),
    }


def measure(
    name: str, model: Any, size: tuple[int, int, int], temperature: float, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Time both contenders, a plain forward pass and a read of the logits."""
    batch, length, vocab = size
    mask_id, steps = vocab - 1, options.steps
    diffusion = MaskedDiffusion(model, mask_id)
    init = torch.full((batch, length), mask_id, device=options.device)
    prompt = length // 4  # without one, all positions of a relative-position model are equal but for rounding
    stream = torch.Generator(options.device).manual_seed(0)
    init[:, :prompt] = torch.randint(mask_id, (batch, prompt), generator=stream, device=options.device)
    contenders = contenders_on(model, mask_id, init, steps, temperature)
    equal = None
    if temperature == 0:  # in float64, where no two confidences tie by rounding
        exact = model if name == "stub" else copy.deepcopy(model).double()
        equal = torch.equal(*(run() for run in contenders_on(exact, mask_id, init, steps, 0.0).values()))
    logits = diffusion.logits(init).detach()

    @torch.no_grad()
    def forward() -> None:
        for _ in range(steps):
            diffusion.logits(init)

    timed = {**contenders, "forward": forward, "read": logits.sum}
    times = in_turn(timed, options.samples, device=options.device)
    median = {key: statistics.median(values) for key, values in times.items()}
    share = (1 - prompt / length) * (steps + 1) / 2  # of all logits that compete, summed over steps
    for key in contenders:
        yield {
            "model": name,
            "contender": key,
            "temperature": temperature,
            "batch": batch,
            "length": length,
            "vocab": vocab,
            "steps": steps,
            "seconds": round(median[key], 4),
            "seconds_all": [round(value, 4) for value in times[key]],
            "times_faster": round(median["loop"] / median[key], 2),
            "over_forward": None if name == "stub" else round(median[key] / median["forward"] - 1, 3),
            "over_limit": round(median[key] / (median["read"] * share), 2) if name == "stub" else None,
            "equal": equal,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stubs", type=shape, nargs="*", default=[(8, 256, 32000), (4, 128, 8000)], help=SHAPES)
    parser.add_argument("--networks", type=shape, nargs="*", default=[(32, 128, 512)], help=SHAPES)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="a table on stderr")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    publish(settings(options), cases(options), KEYS, table=options.table)


if __name__ == "__main__":
    main()
