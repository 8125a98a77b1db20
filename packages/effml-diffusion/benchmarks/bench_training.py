"""One training step of masked diffusion, loss and gradients: the head at masks only, against the public codes' steps.

    python packages/effml-diffusion/benchmarks/bench_training.py --table
    python packages/effml-diffusion/benchmarks/bench_training.py --vocabs 258 --batch 2 --length 128 --samples 2

One JSON line per case on stdout. All contenders train one `DiffusionTransformer` on one corruption, in float32, and the
public ones are written here from what their code does with the network's output:

    effml   `MaskedDiffusion.loss`: the head at masked positions, the cross-entropy of those logits
    mdlm    all logits; the mask's lowered in place, log-softmax everywhere, the result overwritten by boolean indices
            at what is not masked, then the targets' read (kuleshov-group/mdlm, SUBS)
    llada   all logits; those at masks copied by boolean indices, and their cross-entropy (the guidelines of
            ML-GSAI/LLaDA, here without the mask's logit, as in the others)

Before anything is timed, losses must agree to 1e-5 of the first; `gradient_off` is the same of all gradients together.
Medians, contenders in turn; `times_faster` is that of effml, the median of the ratios within a turn. `gflop` counts the
products of one step, and `head_share` is that part of them in the head, 6 d_model vocab per row. That is what bounds a
step: `flop_ratio`, the products over those of effml, is the speed-up that saved products alone would give; what
`times_faster` is beyond it comes from passes over logits. `peak_mib` is what a step adds to the memory of a process of
its own, after a short one: resident memory, or on a GPU what is allocated there.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from effml_diffusion import Corruption, DiffusionTransformer, DiffusionTransformerConfig, MaskedDiffusion
from effml_shared.benchmarks import high_water, in_fresh_process, in_turn, publish, settings
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

KEYS = (
    "vocab",
    "contender",
    "seconds",
    "tokens_per_s",
    "times_faster",
    "flop_ratio",
    "gflop",
    "head_share",
    "peak_mib",
)
Loss = Callable[[DiffusionTransformer, Tensor, Corruption], Tensor]


def effml(model: DiffusionTransformer, x: Tensor, corruption: Corruption) -> Tensor:
    return objective(model).loss(x, corruption=corruption).loss


def mdlm(model: DiffusionTransformer, x: Tensor, corruption: Corruption) -> Tensor:
    z, mask_id = corruption.z, model.config.vocab_size - 1
    logits = model(z).logits
    logits[..., mask_id] += -1e6
    log_probs = logits - logits.logsumexp(-1, keepdim=True)
    known = z != mask_id
    log_probs[known] = -1e6
    log_probs[known, z[known]] = 0
    entropies = -log_probs.gather(-1, x[..., None]).squeeze(-1)
    return (entropies * corruption.weight.float()[:, None]).sum() / x.numel()


def llada(model: DiffusionTransformer, x: Tensor, corruption: Corruption) -> Tensor:
    masked, mask_id = corruption.mask, model.config.vocab_size - 1
    logits = model(corruption.z).logits
    logits[..., mask_id] = -torch.inf
    entropies = F.cross_entropy(logits[masked], x[masked], reduction="none")
    weight = corruption.weight.float()[:, None].expand_as(x)
    return (entropies * weight[masked]).sum() / x.numel()


CONTENDERS: dict[str, Loss] = {"effml": effml, "mdlm": mdlm, "llada": llada}


def objective(model: DiffusionTransformer) -> MaskedDiffusion:
    return MaskedDiffusion(model, model.config.vocab_size - 1, reduction="padded")


def network(vocab: int, options: argparse.Namespace) -> DiffusionTransformer:
    """Return a network whose head is not zero, as at the start, but predicts something."""
    config = DiffusionTransformerConfig(
        n_layers=options.layers,
        d_model=options.width,
        n_heads=max(1, options.width // 64),
        d_ff=4 * options.width,
        vocab_size=vocab,
    )
    model = DiffusionTransformer(config)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.lm_head.weight, std=config.d_model**-0.5)
    return model.to(options.device)


def inputs(model: DiffusionTransformer, shape: tuple[int, int]) -> tuple[Tensor, Corruption]:
    """Return texts, and a corruption of them as in training: at times that are spread evenly."""
    stream = torch.Generator().manual_seed(1)
    x = torch.randint(model.config.vocab_size - 1, shape, generator=stream).to(model.lm_head.weight.device)
    return x, objective(model).corrupt(x, generator=stream)


def step(loss: Loss, model: DiffusionTransformer, x: Tensor, corruption: Corruption) -> Tensor:
    """Leave the gradients in the model and return the loss."""
    model.zero_grad()
    value = loss(model, x, corruption)
    value.backward()
    return value.detach()


def gradients(model: DiffusionTransformer) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def compare(vocab: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Check, time and weigh all contenders with one vocabulary; yield one row for each."""
    model = network(vocab, options)
    x, corruption = inputs(model, (options.batch, options.length))
    losses, reference, flops, off = {}, None, {}, {}
    for name, loss in CONTENDERS.items():
        with FlopCounterMode(display=False) as counter:
            losses[name] = float(step(loss, model, x, corruption))
        flops[name], gradient = counter.get_total_flops(), gradients(model)
        reference = gradient if reference is None else reference
        off[name] = float((gradient - reference).norm() / reference.norm())
        if not abs(losses[name] / losses["effml"] - 1) <= 1e-5:
            raise SystemExit(f"{name}: got a loss of {losses[name]}, expected that of effml, {losses['effml']}")
    steps = {name: partial(step, loss, model, x, corruption) for name, loss in CONTENDERS.items()}
    times = in_turn(steps, options.samples, warm_up=0, device=options.device)  # the checks were the warm-up
    median = {name: statistics.median(values) for name, values in times.items()}
    masks = int(corruption.mask.sum())
    for name in CONTENDERS:
        head = 6 * options.width * vocab * (masks if name == "effml" else x.numel())
        yield {
            "vocab": vocab,
            "contender": name,
            "seconds": round(median[name], 4),
            "seconds_all": [round(value, 4) for value in times[name]],
            "tokens_per_s": round(x.numel() / median[name]),
            "times_faster": round(
                statistics.median(a / b for a, b in zip(times[name], times["effml"], strict=True)), 2
            ),
            "flop_ratio": round(flops[name] / flops["effml"], 2),
            "gflop": round(flops[name] / 1e9, 2),
            "head_share": round(head / flops[name], 3),
            "masked_share": round(masks / x.numel(), 3),
            "peak_mib": round(in_fresh_process(added_memory, name, vocab, options), 1),
            "loss": losses[name],
            "gradient_off": off[name],
        }


def added_memory(contender: str, vocab: int, options: argparse.Namespace) -> float:
    """Return the MiB that one step adds to this process."""
    model, loss = network(vocab, options), CONTENDERS[contender]
    step(loss, model, *inputs(model, (1, 16)))
    x, corruption = inputs(model, (options.batch, options.length))
    before = high_water(options.device)
    step(loss, model, x, corruption)
    return high_water(options.device) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabs", type=int, nargs="+", default=[258, 32000])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--table", action="store_true", help="a table on stderr")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = itertools.chain.from_iterable(compare(vocab, options) for vocab in options.vocabs)
    publish(settings(options), rows, KEYS, table=options.table)


if __name__ == "__main__":
    main()
