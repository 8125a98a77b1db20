"""`arch.rt_lm`: language models on real text, recurrent and standard, deep and narrow or shallow and wide.

What is tested, in miniature. Four models share depth times width squared, so that they have equal parameters outside
embedding and head: a recurrent (RT) and a standard one (T), each with all the layers and with fewer, wider ones. The
claims are about held-out loss: RT against T of the same shape; the shallow RT, whose cache is smaller, against the deep
T; what either loses by becoming shallow. Equal parameters are not equal FLOPs, since a recurrent layer projects keys
and values twice: a fifth training gives the deep T as many more steps as the deep RT takes FLOPs (forward and backward
counted as three forward passes; what the tiled backward pass recomputes is left out). Wider models also have a larger
embedding and head, as in the paper; at our size these are half of the model, which favours the shallow shapes.

Nothing here says that the same holds at the paper's size, thousands of times ours, with as many times the tokens.

Protocol. All models of a seed see the same batches, and those of one shape start from the same weights. Each model's
learning rate is the best of one grid at a tuning seed that no claim uses. AdamW without weight decay and ALiBi,
LayerNorm, QK-norm and GELU are the paper's; warm-up, tokens and sizes are ours. Cache bytes are exact. Seconds per step
are this machine's: the recurrent models pay for their positions in sequence, and no claim hides that.

Source: Oncescu et al., arXiv 2604.21215, table 1; a comparison at equal FLOPs is our own.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from effml_shared import seeding
from effml_shared.checks import check_count
from effml_shared.data import DataConfig
from effml_shared.errors import ConfigError
from effml_shared.experiments import Claim, Experiment
from effml_shared.runs import Run
from effml_shared.schedules import cosine
from effml_shared.trainings import TrainingBench, TrainingConfig, best_rates, half_width, numbers
from effml_shared.transformer import Transformer, TransformerConfig
from torch import nn

from effml_arch.cost_ledger import CostLedger, rt_cost, transformer_cost
from effml_arch.experiments.paper import PAPER
from effml_arch.recurrent import RecurrentTransformer, RecurrentTransformerConfig
from effml_arch.width_search import body_params, match_width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RtLmConfig", "experiment"]

MODELS = ("RT deep", "RT shallow", "T deep", "T shallow")
LONGER = "T deep, equal FLOPs"


def _shape(n_layers: int, d_model: int, head_dim: int) -> TransformerConfig:
    return TransformerConfig(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=d_model // head_dim,
        position="alibi",
        norm="layer",
        norm_eps=1e-5,
        qk_norm="full",
        mlp="gelu",
    )


@dataclass
class RtLmConfig(TrainingConfig):
    """What is trained and how long; `model` is the deep shape, of which the shallow one follows."""

    model: TransformerConfig = field(default_factory=lambda: _shape(2, 56, 8))
    shallow_layers: int = 1  # of the shallow shape, at the width of nearest parameters
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("shallow_layers", self.shallow_layers, 1)
        if self.shallow_layers >= self.model.n_layers:
            raise ConfigError(f"shallow_layers: got {self.shallow_layers}, expected fewer than {self.model.n_layers}")
        if len(self.betas) != 2:
            raise ConfigError(f"betas: got {self.betas}, expected two numbers")
        _recurrent(self.model)  # a bidirectional or post-norm model has no recurrent twin

    def shapes(self) -> dict[str, TransformerConfig]:
        """Return the configuration of each model."""
        thin = replace(self.model, n_layers=self.shallow_layers)
        shallow = match_width(thin, body_params(self.model), multiple=self.model.head_dim)
        return {
            "RT deep": _recurrent(self.model),
            "RT shallow": _recurrent(shallow),
            "T deep": self.model,
            "T shallow": shallow,
        }


def smoke() -> RtLmConfig:
    """Return a configuration that shows in seconds that everything runs; its numbers mean nothing."""
    return RtLmConfig(
        model=_shape(2, 16, 8),
        shallow_layers=1,
        data=DataConfig(seq_len=16, max_bytes=2_000_000),
        batch_size=4,
        steps=3,
        learning_rates=[5e-3, 1e-2],
        seeds=2,
        eval_sequences=8,
        precision="float32",
    )


def cpu() -> RtLmConfig:
    """Return the default: 75 thousand parameters and the embeddings, 0.6 million bytes a training, in 600 steps.

    Tokens decide. In single trainings the deep RT was 0.04 nats behind the deep T after 0.24 million bytes (4 x 80),
    0.03 ahead after these, and 0.08 ahead after 2 million.
    """
    return RtLmConfig(data=DataConfig(seq_len=64), steps=600, learning_rates=[5e-3, 1e-2], precision="float32")


def gpu() -> RtLmConfig:
    """Return 11 million parameters, 6 x 384 or 3 x 512, and 13 million bytes a training.

    Batches are large because a recurrent layer's time is that of its positions in sequence, whatever the batch.
    """
    return RtLmConfig(
        model=_shape(6, 384, 64),
        shallow_layers=3,
        data=DataConfig(seq_len=128),
        batch_size=512,
        steps=200,
        learning_rates=[1e-3, 3e-3],
        eval_sequences=512,
    )


def _recurrent(config: TransformerConfig) -> RecurrentTransformerConfig:
    return RecurrentTransformerConfig(**asdict(config))


class _Bench(TrainingBench):
    def of(self, config: TransformerConfig) -> _Bench:
        """Return a bench on the same data that trains a model of this configuration."""
        bench = copy.copy(self)
        bench.model_config = replace(config, vocab_size=self.model_config.vocab_size)
        return bench

    def model(self, seed: int) -> nn.Module:
        config, seed = self.model_config, seeding.derive_seed(seed, "model")
        if isinstance(config, RecurrentTransformerConfig):
            return RecurrentTransformer(config, seed).to(self.device)
        return Transformer(config, seed).to(self.device)

    def cost(self) -> CostLedger:
        """Return what one sequence costs this bench's model."""
        config, seq_len = self.model_config, self.config.data.seq_len
        return (rt_cost if isinstance(config, RecurrentTransformerConfig) else transformer_cost)(config, seq_len)


def _train(bench: _Bench, config: RtLmConfig, name: str, steps: int, lr: float, seed: int) -> dict[str, Any]:
    samples = steps * config.batch_size
    schedule = cosine(config.batch_size, samples, warmup=int(config.warmup * samples), floor=0.1)

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        beta1, beta2 = config.betas
        return torch.optim.AdamW(model.parameters(), lr, betas=(beta1, beta2), weight_decay=0.0, fused=True)

    return bench.train(f"{name}/lr={lr:g}/seed={seed}", optimizer, schedule, samples=samples, seed=seed)


def run(config: RtLmConfig, run: Run) -> dict[str, Any]:
    """Train everything and return effects per seed, a table, and what the figures need."""
    bench = _Bench(config, run)
    benches = {name: bench.of(shape) for name, shape in config.shapes().items()}
    costs = {name: bench.cost() for name, bench in benches.items()}
    flops = {name: cost.training_flops_per_token for name, cost in costs.items()}
    longer = round(config.steps * flops["RT deep"] / flops["T deep"])
    trainings = len(MODELS) * (len(config.learning_rates) + config.seeds)
    run.expect((trainings * config.steps + config.seeds * longer) * config.batch_size)

    def train(name: str, lr: float, seed: int, steps: int = config.steps) -> dict[str, Any]:
        return _train(benches["T deep" if name == LONGER else name], config, name, steps, lr, seed)

    tuning = {name: {lr: train(name, lr, 0)["loss"] for lr in config.learning_rates} for name in MODELS}
    best = best_rates(tuning)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in (*MODELS, LONGER)}
    for seed in range(1, config.seeds + 1):  # model after model within a seed: a machine's drift meets all alike
        for name in MODELS:
            found[name].append(train(name, best[name], seed))
        found[LONGER].append(train(LONGER, best["T deep"], seed, longer))

    losses = {name: [result["loss"] for result in results] for name, results in found.items()}
    parameters = _below(losses["T deep"], losses["RT deep"])
    standard, recurrent = (_below(losses[f"{kind} shallow"], losses[f"{kind} deep"]) for kind in ("T", "RT"))
    ends = (min(config.learning_rates), max(config.learning_rates))
    table = []
    for name, results in found.items():
        of = "T deep" if name == LONGER else name
        shape, cost, rate = benches[of].model_config, costs[of], best[of]
        seconds = statistics.fmean(result["seconds"] / result["steps"] for result in results)
        table.append(
            {
                "model": name,
                "layers x width": f"{shape.n_layers} x {shape.d_model}",
                "parameters": cost.params,
                "outside embedding and head": cost.body_params,
                "KV bytes per token": cost.kv_bytes_per_token,
                "learning rate": f"{rate:g}" + (" (end of grid)" if rate in ends else ""),
                "held-out loss (nats)": statistics.fmean(losses[name]),
                "± 95%": half_width(losses[name]),
                "below T deep": statistics.fmean(_below(losses["T deep"], losses[name])),
                "± 95% paired": half_width(_below(losses["T deep"], losses[name])),
                "training FLOPs, T deep = 1": flops[of] * results[0]["steps"] / (flops["T deep"] * config.steps),
                "ms per step": 1000 * seconds,
            }
        )
    return {
        "effects": {
            "parameters": parameters,
            "shallow": _below(losses["T deep"], losses["RT shallow"]),
            "depth": _below(standard, recurrent),
            "flops": _below(losses[LONGER], losses["RT deep"]),
        },
        "table": table,
        "tuning": {name: [[lr, loss] for lr, loss in of.items()] for name, of in tuning.items()},
        "finals": losses,
        "cache": {name: cost.kv_bytes_per_token for name, cost in costs.items()},
    }


def _below(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """Return seed by seed by how much ours is below theirs; NaN where both diverged."""
    return [their - our for their, our in zip(theirs, ours, strict=True)]


def figures(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Figure]:
    """Draw training losses, held-out loss against the cache, and the learning-rate grid."""
    from matplotlib.figure import Figure

    if "cache" not in summary:
        return {}
    colors = {"RT deep": "#1f6fb4", "RT shallow": "#6fb1e0", "T deep": "#4b5563", "T shallow": "#a3a9b3"}
    colors[LONGER] = "#c2711f"

    training = Figure(figsize=(7.5, 3.6))
    curves = training.add_subplot()
    for name, color in colors.items():
        of_seeds: dict[int, list[float]] = {}
        for row in rows:
            if row["trial"].startswith(f"{name}/") and not row["trial"].endswith("seed=0"):
                of_seeds.setdefault(row["tokens"], []).extend(numbers([row["loss"]] if "loss" in row else []))
        points = [(tokens, statistics.fmean(losses)) for tokens, losses in sorted(of_seeds.items()) if losses]
        window = 1 + len(points) // 30
        means = [
            statistics.fmean(loss for _, loss in points[max(0, i - window) : i]) for i in range(1, len(points) + 1)
        ]
        curves.plot([tokens for tokens, _ in points], means, color=color, linewidth=1.2, label=name)
    curves.set(xlabel="tokens", ylabel="training loss, running mean (nats)", xscale="log")

    frontier = Figure(figsize=(7.5, 3.6))
    axes = frontier.add_subplot()
    finals = {name: numbers(losses) for name, losses in summary["finals"].items()}
    for kind, marker in (("RT", "o"), ("T", "s")):
        pair = [f"{kind} shallow", f"{kind} deep"]
        cache, means = [summary["cache"][name] for name in pair], [statistics.fmean(finals[name]) for name in pair]
        axes.plot(cache, means, color=colors[pair[1]], linewidth=1, alpha=0.6)
        for name, x, mean in zip(pair, cache, means, strict=True):
            axes.plot([x] * len(finals[name]), finals[name], marker, color=colors[name], alpha=0.45, markersize=4)
            axes.plot(x, mean, marker, color=colors[name], markersize=9, label=f"{name} (small: seeds)")
    axes.set(xlabel="KV cache, bytes per token in bfloat16", ylabel="held-out loss (nats)")

    tuning = Figure(figsize=(7.5, 3.2))
    grid = tuning.add_subplot()
    for name, pairs in summary["tuning"].items():
        grid.plot([lr for lr, _ in pairs], numbers([v for _, v in pairs]), "o-", color=colors[name], label=name)
    grid.set(xscale="log", xlabel="learning rate", ylabel="held-out loss (nats)")

    for panel in (curves, axes, grid):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    for figure in (training, frontier, tuning):
        figure.tight_layout()
    return {
        "Training: loss on the same batches": training,
        "Frontier: held-out loss against the bytes that a token keeps in the cache": frontier,
        "Tuning: the learning-rate grid at the tuning seed": tuning,
    }


experiment = Experiment(
    name="arch.rt_lm",
    title="At equal parameters a Recurrent Transformer reaches a lower loss, with fewer layers and a smaller cache too",
    paper="Oncescu et al., The Recurrent Transformer, arXiv 2604.21215",
    presets={"smoke": smoke, "cpu": cpu, "gpu": gpu},
    minutes={"smoke": "5 s", "cpu": "5 min", "gpu": "not measured"},
    run=run,
    claims=(
        Claim(
            "parameters",
            "At equal parameters and depth the Recurrent Transformer has the lower loss",
            "0.029 nats at 300M, 12 layers (2.867, Transformer 2.896), C4",
            " nats below the Transformer",
            at_least=0.0,
        ),
        Claim(
            "shallow",
            "With half the layers and a smaller KV cache it is still no worse than the deep Transformer",
            "0.036 nats at 300M, 6 x 2048 against 12 x 1408 (2.860, Transformer 2.896), 27% fewer bytes",
            " nats below the deep Transformer",
            at_least=0.0,
        ),
        Claim(
            "depth",
            "Fewer, wider layers cost the Transformer more loss than the Recurrent Transformer",
            "0.028 nats at 300M: 0.021 lost by the Transformer, 0.007 gained by the Recurrent Transformer",
            " nats less lost",
            at_least=0.0,
        ),
        Claim(
            "flops",
            "Its loss is lower at equal FLOPs too, the Transformer taking more steps",
            "not stated; our own comparison",
            " nats below the Transformer",
            at_least=0.0,
        ),
    ),
    figures=figures,
    papers=(PAPER,),
)
