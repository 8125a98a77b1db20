"""`arch.rt_state`: what one recurrent layer learns and one standard layer does not: prefix parity and recall.

Protocol. One-layer models of one shape, recurrent (RT-1) and standard (T-1), and a standard one of two layers (T-2) are
trained on fresh samples, under one cosine schedule and one learning rate, which is not tuned. All models of a seed see
the same samples, and those of one depth start from the same weights. The measure is the share of right answers on new
sequences, and besides at twice the length. Parity needs a state, where attention that reads inputs only must count.
Recall needs two steps: look back for the key, then one further for its value. A layer whose persistent pairs were
secretly made from its input would do as badly as T-1 on both.

Source: Oncescu et al., arXiv 2604.21215: one layer can emulate a recurrence from token to token (theory), and is above
a standard one on five synthetic tasks, in-context recall among them (curves, whose values we do not have). Parity as a
test of it, the sizes and the thresholds are ours: a recurrent layer is to reach 0.9 where a standard one stays below
0.65 (parity) and 0.45 (recall); the claims ask for these gaps.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from effml_shared import distributed, seeding
from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.experiments import Claim, Experiment
from effml_shared.loop import Budget, Loop
from effml_shared.runs import Run, Trial
from effml_shared.schedules import cosine
from effml_shared.steps import GradientStep
from effml_shared.tensors import cross_entropy_sum
from effml_shared.trainings import half_width
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn

from effml_arch.experiments.paper import PAPER
from effml_arch.recurrent import RecurrentTransformer, RecurrentTransformerConfig
from effml_arch.tasks import Recall, Task, TaskStream, WordProblem, accuracy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RtStateConfig", "experiment"]

MODELS = {"RT-1": 1, "T-1": 1, "T-2": 2}  # layers
TASKS = ("parity", "recall")


@dataclass
class RtStateConfig:
    """The shape of all models, both tasks, and how long each is trained."""

    d_model: int = 32
    n_heads: int = 4
    parity: WordProblem = field(default_factory=WordProblem)
    parity_steps: int = 400
    recall: Recall = field(default_factory=Recall)
    recall_steps: int = 600
    batch_size: int = 64  # sequences per step
    lr: float = 3e-3  # of AdamW
    warmup: int = 50  # steps
    clip_norm: float = 1.0
    seeds: int = 3
    eval_sequences: int = 512  # new ones, at the end of every training

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "parity_steps", "recall_steps", "batch_size", "seeds", "eval_sequences"):
            check_count(name, getattr(self, name), 1)
        check_count("warmup", self.warmup, 0)
        check_range("lr", self.lr, 0.0)
        if not self.clip_norm > 0:
            raise ConfigError(f"clip_norm: got {self.clip_norm}, expected a number > 0")
        if self.warmup >= min(self.parity_steps, self.recall_steps):
            steps = f"parity_steps={self.parity_steps} and recall_steps={self.recall_steps}"
            raise ConfigError(f"warmup: got {self.warmup} steps, expected fewer than {steps}")

    def task(self, name: str) -> tuple[Task, int]:
        """Return a task and the steps of a training on it."""
        return (self.parity, self.parity_steps) if name == "parity" else (self.recall, self.recall_steps)


def smoke() -> RtStateConfig:
    """Return a configuration that shows in seconds that everything runs; its numbers mean nothing."""
    return RtStateConfig(
        d_model=16,
        n_heads=2,
        parity=WordProblem(length=6),
        parity_steps=3,
        recall=Recall(length=8),
        recall_steps=3,
        batch_size=4,
        warmup=1,
        seeds=1,
        eval_sequences=8,
    )


def cpu() -> RtStateConfig:
    """Return the default: models of 12 to 26 thousand parameters."""
    return RtStateConfig()


def gpu() -> RtStateConfig:
    """Return the paper's width of 128 with 16 heads, on sequences twice as long."""
    return RtStateConfig(
        d_model=128,
        n_heads=16,
        parity=WordProblem(length=32),
        parity_steps=600,
        recall=Recall(length=64, key_tokens=16, value_tokens=16, n_keys=16),
        recall_steps=600,
        batch_size=256,
        lr=1e-3,
        eval_sequences=2048,
    )


def run(config: RtStateConfig, run: Run) -> dict[str, Any]:
    """Train everything and return effects per seed, a table, and what the figures need."""
    run.expect(config.seeds * config.batch_size * len(MODELS) * (config.parity_steps + config.recall_steps))
    found: dict[str, dict[str, list[dict[str, Any]]]] = {task: {name: [] for name in MODELS} for task in TASKS}
    for seed in range(1, config.seeds + 1):
        for task in TASKS:
            for name in MODELS:
                trial = f"{name}/{task}/seed={seed}"
                found[task][name].append(run.trial(trial, partial(_train, config, name, task, seed)))
    right = {task: {name: [row["accuracy"] for row in rows] for name, rows in of.items()} for task, of in found.items()}
    return {
        "effects": {
            "parity": _gap(right["parity"], "T-1"),
            "recall": _gap(right["recall"], "T-1"),
            "depth": _gap(right["parity"], "T-2"),
        },
        "table": [
            {
                "task": task,
                "model": name,
                "parameters": rows[0]["parameters"],
                "right answers (%)": _percent(rows, "accuracy"),
                "± 95%": half_width([math.nan if a is None else 100 * a for a in right[task][name]]),
                "at twice the length (%)": _percent(rows, "accuracy_twice"),
                "ms per step": 1000 * statistics.fmean(row["seconds"] / row["steps"] for row in rows),
            }
            for task, of in found.items()
            for name, rows in of.items()
        ],
        "accuracy": right,
    }


def _gap(right: dict[str, list[float | None]], other: str) -> list[float | None]:
    """Return by how many percentage points the recurrent layer is above another model; None where one diverged."""
    pairs = zip(right["RT-1"], right[other], strict=True)
    return [None if ours is None or theirs is None else 100 * (ours - theirs) for ours, theirs in pairs]


def _percent(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows]
    return None if None in values else 100 * statistics.fmean(values)


def _model(config: RtStateConfig, name: str, task: Task, seed: int) -> nn.Module:
    shape: dict[str, Any] = {
        "n_layers": MODELS[name],
        "d_model": config.d_model,
        "n_heads": config.n_heads,
        "d_ff": 4 * config.d_model,
        "vocab_size": task.vocab_size,
        "vocab_rows": task.vocab_size,
        "position": "alibi",
        "qk_norm": "head",
        "mlp": "gelu",
    }
    seed = seeding.derive_seed(seed, "model")
    if name.startswith("RT"):
        return RecurrentTransformer(RecurrentTransformerConfig(**shape), seed)
    return Transformer(TransformerConfig(**shape), seed)


def _train(config: RtStateConfig, name: str, task_name: str, seed: int, trial: Trial) -> dict[str, Any]:
    """Train one model on one task; a training that meets NaN or infinity has no accuracy."""
    task, steps = config.task(task_name)
    model = _model(config, name, task, seed).to(distributed.default_device())
    replica = distributed.parallelize(model, "ddp")
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.98), weight_decay=0.0)
    step = GradientStep(replica, optimizer, _loss, clip_norm=config.clip_norm)
    stream_seed = seeding.derive_seed(seed, "train")
    samples = steps * config.batch_size
    loop = Loop(
        step,
        TaskStream(task, seed=stream_seed, rank=distributed.rank(), world_size=distributed.world_size()),
        cosine(config.batch_size, samples, warmup=config.warmup * config.batch_size),
        budget=Budget(samples=samples),
        hooks=trial.hooks,
        evaluate=lambda: {"accuracy": _measure(model, task, config.eval_sequences)},
        checkpoints=trial.checkpoints,
        seed=seed,
    )
    right: dict[str, float | None]
    try:
        loop.run()
        twice = _measure(model, _at_twice_the_length(task), config.eval_sequences)
        right = {"accuracy": loop.evaluation["accuracy"], "accuracy_twice": twice}
    except NonFiniteError:
        right = {"accuracy": None, "accuracy_twice": None}
    clock = loop.clock
    return {
        "method": name,
        "task": task_name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **right,
        "steps": max(clock.step, 1),
        "seconds": clock.seconds,
        "samples": samples,
    }


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return cross_entropy_sum(model(batch["input_ids"]).logits, batch["targets"])


def _at_twice_the_length(task: Task) -> Task:
    values = {entry.name: getattr(task, entry.name) for entry in fields(task)}  # type: ignore[arg-type]
    return type(task)(**{**values, "length": 2 * task.length})


@torch.no_grad()
def _measure(model: nn.Module, task: Task, sequences: int) -> float:
    """Return the share of right answers on sequences that are the same for every model and seed."""
    batch = task.batch(range(sequences), seed=seeding.derive_seed(0, "held out"))
    device = next(model.parameters()).device
    return accuracy(model(batch["input_ids"].to(device)).logits, batch["targets"].to(device))


def figures(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Figure]:
    """Draw the accuracy of every seed, and the training losses."""
    from matplotlib.figure import Figure

    if "accuracy" not in summary:
        return {}
    colors = {"RT-1": "#1f6fb4", "T-1": "#6b7280", "T-2": "#c2711f"}

    points = Figure(figsize=(7.5, 3.0))
    for place, task in enumerate(TASKS):
        axes = points.add_subplot(1, 2, place + 1)
        for x, name in enumerate(MODELS):
            values = [100 * value for value in summary["accuracy"][task][name] if value is not None]
            axes.plot([x] * len(values), values, "o", color=colors[name], alpha=0.7)
        axes.set_xticks(range(len(MODELS)), list(MODELS))
        axes.set(title=task, ylim=(0, 103), xlim=(-0.5, len(MODELS) - 0.5), ylabel="right answers (%)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    points.tight_layout()

    curves = Figure(figsize=(7.5, 3.2))
    for place, task in enumerate(TASKS):
        axes = curves.add_subplot(1, 2, place + 1)
        for name in MODELS:
            for trial in sorted({row["trial"] for row in rows if row["trial"].startswith(f"{name}/{task}/")}):
                mine = [row for row in rows if row["trial"] == trial and "loss" in row]
                label = name if trial.endswith("seed=1") else None
                axes.plot([r["step"] for r in mine], [r["loss"] for r in mine], color=colors[name], lw=0.8, label=label)
        axes.set(title=task, xlabel="step", ylabel="training loss (nats per answer)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    curves.tight_layout()
    return {"Right answers on new sequences, every seed": points, "Training: loss of every seed": curves}


experiment = Experiment(
    name="arch.rt_state",
    title="One recurrent layer learns prefix parity and associative recall, one standard layer neither",
    paper="Oncescu et al., The Recurrent Transformer, arXiv 2604.21215",
    presets={"smoke": smoke, "cpu": cpu, "gpu": gpu},
    minutes={"smoke": "3 s", "cpu": "4 min", "gpu": "not measured"},
    run=run,
    claims=(
        Claim(
            "parity",
            "One recurrent layer carries a state along the sequence: prefix parity, against one standard layer",
            "a layer can emulate a token-to-token recurrence (theory); no number",
            " points more right answers",
            at_least=25.0,
        ),
        Claim(
            "recall",
            "One recurrent layer is above one standard layer on associative recall",
            "above on in-context recall, one layer of width 128 (curves, values not known to us)",
            " points more right answers",
            at_least=45.0,
        ),
        Claim(
            "depth",
            "On prefix parity one recurrent layer is above two standard ones",
            "fewer layers suffice (language modelling); parity is our test",
            " points more right answers",
            at_least=20.0,
        ),
    ),
    figures=figures,
    papers=(PAPER,),
)
