"""One training step of a TopK sparse autoencoder, against the public libraries' steps, and what each learns.

    python packages/effml-eval/benchmarks/bench_sae.py --table
    python packages/effml-eval/benchmarks/bench_sae.py --concepts 4096 --batch 512 --samples 2 --parts speed memory

One JSON line per case on stdout. All contenders train in float32 on the same embeddings with Adam; the public ones are
skipped where they are not installed. A step is everything from a batch to the next one: forward, backward, clipping,
optimizer and whatever a library does to the atoms.

    effml               `DictionaryStep`, TopK or BatchTopK, on as many threads as asked for
    effml_dense         the same losses from the whole matrix of pre-activations, with dense decoding: what a plain
                        implementation does
    dictionary_learning `TopKTrainer.update` or `BatchTopKTrainer.update` (saprmarks/dictionary_learning)
    sae_lens            `TopKTrainingSAE` or `BatchTopKTrainingSAE` and the steps of its trainer (SAELens 6)
    overcomplete        `TopKSAE` or `BatchTopKSAE` and the steps of its `train_sae` (KempnerInstitute/overcomplete)

Medians, contenders in turn; `times_faster` is that of effml over the contender, the median of ratios within a turn.
`encoder_share` is the time that the float32 product of the encoder alone takes here, over that of the step: above 1 the
step costs less than that product, which every plain implementation makes first. `peak_mib` is what a model, its
optimizer and two steps add to the memory of a process of its own, after a small model has taken a step there. Quality
is the R2 about the mean of each dimension and the L0 on held-out rows in eval mode, after equally many steps of the
same batches, as a mean over seeds: of paired image and text embeddings that share concepts (arXiv 2504.11695).
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from effml_eval.concepts.reconstruction import Reconstruction
from effml_eval.sae.autoencoder import SparseAutoencoder
from effml_eval.sae.autoencoder_config import SAEConfig
from effml_eval.sae.sparsifiers import batch_topk_codes, topk_codes
from effml_eval.sae.training import DictionaryStep
from effml_shared.benchmarks import high_water, in_fresh_process, in_turn, publish, say, settings
from effml_shared.schedules import Plan
from torch import Tensor

KEYS = (
    "kind",
    "concepts",
    "contender",
    "seconds",
    "tokens_per_s",
    "times_faster",
    "encoder_share",
    "peak_mib",
    "r2",
    "l0",
)
PARTS = ("speed", "memory", "quality")
PEERS = ("dictionary-learning", "sae-lens", "overcomplete")
DEAD_AFTER = 10_000_000


class Effml:
    """The step of `effml_eval`."""

    def __init__(self, kind: str, options: argparse.Namespace, concepts: int) -> None:
        config = SAEConfig(d_in=options.dim, n_concepts=concepts, kind=kind, k=options.k, seed=options.seed)
        self.sae = SparseAutoencoder(config).to(options.device)
        self.sae.threshold_decay = min(0.999, max(0.0, 1 - 30 / options.quality_steps))
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=options.lr, fused=True)
        self.trainer = DictionaryStep(self.sae, self.optimizer)

    def step(self, x: Tensor, lr_factor: float = 1.0) -> None:
        self.trainer(x, Plan(len(x), lr_factor))

    def evaluate(self, x: Tensor) -> tuple[Tensor, float]:
        self.sae.eval()
        with torch.no_grad():
            output = self.sae(x)
        return output.x_hat, float((output.codes.values > 0).sum()) / len(x)


class EffmlDense(Effml):
    """The same model with dense codes."""

    def step(self, x: Tensor, lr_factor: float = 1.0) -> None:
        sae, k = self.sae, float(self.sae.k)
        p = F.linear(x, sae.encoder_weight, sae.encoder_bias)
        codes = topk_codes(p, int(k)) if sae.config.kind == "topk" else batch_topk_codes(p, k)
        loss = (x - codes.dense() @ sae.atoms).square().sum(1).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        sae.before_step_()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
        self.optimizer.step()
        with torch.no_grad():
            sae.after_step_(sae(x[:1])._replace(codes=codes))


class DictionaryLearning:
    """saprmarks/dictionary_learning."""

    def __init__(self, kind: str, options: argparse.Namespace, concepts: int) -> None:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer  # type: ignore[import-not-found]
        from dictionary_learning.trainers.top_k import TopKTrainer  # type: ignore[import-not-found]

        steps = max(options.quality_steps, 10 * options.samples)
        self.trainer = (TopKTrainer if kind == "topk" else BatchTopKTrainer)(
            steps=10 * steps,  # its own schedule stays flat: that of this file is laid over it
            activation_dim=options.dim,
            dict_size=concepts,
            k=options.k,
            layer=0,
            lm_name="none",
            lr=options.lr,
            warmup_steps=0,
            threshold_start_step=0,
            seed=options.seed,
            device=options.device,
        )
        self.count, self.lr, self.thresholded = 0, options.lr, kind == "batch_topk"

    def step(self, x: Tensor, lr_factor: float = 1.0) -> None:
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor
        self.trainer.update(self.count, x)
        self.count += 1

    def evaluate(self, x: Tensor) -> tuple[Tensor, float]:
        model = self.trainer.ae
        with torch.no_grad():
            codes = model.encode(x, use_threshold=self.thresholded)
            return model.decode(codes), float((codes > 0).sum()) / len(x)


class SAELens:
    """SAELens: the body of its trainer's step, without its activation store and logging."""

    def __init__(self, kind: str, options: argparse.Namespace, concepts: int) -> None:
        import sae_lens  # type: ignore[import-not-found]
        from sae_lens.saes.sae import TrainStepInput  # type: ignore[import-not-found]

        name = "TopKTrainingSAE" if kind == "topk" else "BatchTopKTrainingSAE"
        common = {"d_in": options.dim, "d_sae": concepts, "k": options.k, "device": options.device, "dtype": "float32"}
        common |= {"apply_b_dec_to_input": False, "normalize_activations": "none"}
        self.model = getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(**common))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.lr)
        self.input, self.silent, self.count, self.lr = TrainStepInput, torch.zeros(concepts), 0, options.lr
        self.silent = self.silent.to(options.device)

    def step(self, x: Tensor, lr_factor: float = 1.0) -> None:
        self.model.train()
        dead = self.silent * len(x) > DEAD_AFTER
        given = self.input(
            sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=self.count, is_logging_step=False
        )
        output = self.model.training_forward_pass(given)
        with torch.no_grad():
            fired = (output.feature_acts.detach() > 0).float().sum(0)
            fired = fired.to_dense() if fired.is_sparse else fired
            self.silent = torch.where(fired > 0, 0.0, self.silent + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor
        self.optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.count += 1

    def evaluate(self, x: Tensor) -> tuple[Tensor, float]:
        self.model.eval()
        with torch.no_grad():
            codes = self.model.encode(x)
            dense = codes.to_dense() if codes.is_sparse else codes
            return self.model.decode(codes), float((dense > 0).sum()) / len(x)


class Overcomplete:
    """KempnerInstitute/overcomplete."""

    def __init__(self, kind: str, options: argparse.Namespace, concepts: int) -> None:
        from overcomplete.sae import BatchTopKSAE, TopKSAE  # type: ignore[import-not-found]

        if kind == "topk":
            self.model = TopKSAE(options.dim, concepts, top_k=options.k, device=options.device)
        else:  # its k is a total of the batch
            self.model = BatchTopKSAE(options.dim, concepts, top_k=options.k * options.batch, device=options.device)
        self.optimizer, self.lr = torch.optim.Adam(self.model.parameters(), lr=options.lr), options.lr

    def step(self, x: Tensor, lr_factor: float = 1.0) -> None:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_factor
        self.optimizer.zero_grad()
        _, _, x_hat = self.model(x)
        (x - x_hat).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def evaluate(self, x: Tensor) -> tuple[Tensor, float]:
        self.model.eval()
        with torch.no_grad():
            _, codes, x_hat = self.model(x)
        return x_hat, float((codes > 0).sum()) / len(x)


CONTENDERS: dict[str, Callable[[str, argparse.Namespace, int], Any]] = {
    "effml": Effml,
    "effml_dense": EffmlDense,
    "dictionary_learning": DictionaryLearning,
    "sae_lens": SAELens,
    "overcomplete": Overcomplete,
}


def embeddings(rows: int, dim: int, seed: int) -> Tensor:
    """Return unit rows, half of images, half of texts, that share concepts and differ by one direction."""
    world = torch.Generator().manual_seed(0)
    shared = 3 * dim // 2
    shift = F.normalize(torch.randn(dim, generator=world), dim=0)
    topics = F.normalize(torch.randn(shared, dim, generator=world), dim=1)
    noise = F.normalize(torch.randn(2, shared, dim, generator=world), dim=2)
    atoms = F.normalize(math.sqrt(0.6) * topics + math.sqrt(0.4) * noise, dim=2)
    g = torch.Generator().manual_seed(1 + seed)
    odds = (1 + torch.arange(shared)).float() ** -0.7
    parts = []
    for modality, sign in ((0, 0.5), (1, -0.5)):
        count = rows // 2 if modality else rows - rows // 2
        places = torch.multinomial(odds.expand(count, -1), 5, generator=g)
        weights = 0.5 + torch.rand(count, 5, 1, generator=g)
        x = (weights * atoms[modality][places]).sum(1) + sign * shift + 0.02 * torch.randn(count, dim, generator=g)
        parts.append(F.normalize(x, dim=1))
    return torch.cat(parts)[torch.randperm(rows, generator=g)]


def compare(kind: str, concepts: int, names: Sequence[str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield one row per contender: what was asked for of its speed, memory and quality."""
    x = embeddings(options.batch, options.dim, 0).to(options.device)
    contenders = {}
    for name in names:
        try:
            contenders[name] = CONTENDERS[name](kind, options, concepts)
        except (ImportError, AttributeError) as error:  # a library that is installed, but not for these versions
            say(f"{name} is left out: {error}")
    names = list(contenders)
    speeds = speed(contenders, x, concepts, options) if "speed" in options.parts else {}
    del contenders
    for name in names:
        row = {"kind": kind, "concepts": concepts, "contender": name, **speeds.get(name, {})}
        if "memory" in options.parts:
            row["peak_mib"] = round(in_fresh_process(added_memory, name, kind, concepts, options), 1)
        if "quality" in options.parts and name != "effml_dense":  # which learns what effml does
            row |= quality(name, kind, options)
        yield row


def speed(
    contenders: Mapping[str, Any], x: Tensor, concepts: int, options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Time a step of each contender, and the product of the encoder alone."""
    weight = torch.randn(concepts, options.dim, device=options.device)
    timed = {name: partial(contender.step, x) for name, contender in contenders.items()}
    times = in_turn({**timed, "product": lambda: x @ weight.T}, options.samples, device=options.device)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        name: {
            "seconds": round(median[name], 4),
            "seconds_all": [round(value, 4) for value in times[name]],
            "tokens_per_s": round(options.batch / median[name]),
            "times_faster": round(
                statistics.median(a / b for a, b in zip(times[name], times["effml"], strict=True)), 2
            ),
            "encoder_share": round(median["product"] / median[name], 3),
        }
        for name in timed
    }


def quality(name: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train a small model with several seeds, each with a learning rate that falls by half a cosine."""
    results: list[tuple[float, float]] = []
    for seed in range(options.seeds):
        small = argparse.Namespace(**{**vars(options), "dim": 64, "k": 8, "batch": 1024, "lr": 1e-3, "seed": seed})
        torch.manual_seed(seed)
        contender = CONTENDERS[name](kind, small, 256)
        data = embeddings(32_000, 64, 1).to(options.device)
        order = torch.Generator().manual_seed(seed)
        for step in range(options.quality_steps):
            batch = torch.randint(len(data), (1024,), generator=order)
            contender.step(data[batch], 0.5 * (1 + math.cos(math.pi * step / options.quality_steps)))
        x = embeddings(8000, 64, 3).to(options.device)
        x_hat, l0 = contender.evaluate(x)
        meter = Reconstruction()
        meter.update(x, x_hat)
        results.append((meter.r2(), l0))
    r2, l0s = ([round(value, 4) for value in column] for column in zip(*results, strict=True))
    return {"r2": round(statistics.mean(r2), 4), "l0": round(statistics.mean(l0s), 2), "r2_all": r2, "l0_all": l0s}


def added_memory(contender: str, kind: str, concepts: int, options: argparse.Namespace) -> float:
    """Return the MiB that a model, its optimizer and two steps add to this process, whose imports come first."""
    small = argparse.Namespace(**{**vars(options), "dim": 16, "k": 2, "batch": 8})
    CONTENDERS[contender](kind, small, 64).step(embeddings(8, 16, 0).to(options.device))
    x = embeddings(options.batch, options.dim, 0).to(options.device)
    before = high_water(options.device)
    model = CONTENDERS[contender](kind, options, concepts)
    model.step(x)
    model.step(x)
    return high_water(options.device) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["topk", "batch_topk"], choices=["topk", "batch_topk"])
    parser.add_argument("--concepts", type=int, nargs="+", default=[16384])
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--quality-steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3, help="of the quality's trainings")
    parser.add_argument("--seed", type=int, default=0, help="of the models that are timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    parser.add_argument("--table", action="store_true", help="a table on stderr")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    own = ("effml", "effml_dense")
    names = [name for name in options.contenders if name in own or importlib.util.find_spec(name)]
    if "effml" not in names:
        raise SystemExit(
            f"contenders: got {', '.join(names)}, expected effml among them, which the others are rated by"
        )
    sizes = itertools.product(options.kinds, options.concepts)
    rows = itertools.chain.from_iterable(compare(kind, size, names, options) for kind, size in sizes)
    publish(settings(options, *PEERS), rows, KEYS, table=options.table)


if __name__ == "__main__":
    main()
