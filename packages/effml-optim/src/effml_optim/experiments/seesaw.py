"""`optim.seesaw`: a batch that grows in place of the cosine's decay: the same loss in fewer serial steps, to a limit.

Protocol, the paper's: AdamW (betas 0.9 and 0.95, eps 1e-8, no weight decay), 10% warm-up, a cosine decay in samples.
The learning rate is tuned for the cosine alone, on one grid, at a tuning seed that no claim uses, and every ramp takes
it over. Then, per seed, all schedules see the same sequences in the same order, hence spend the same FLOPs: cosine;
Seesaw, which divides the learning rate by sqrt(alpha) and multiplies the batch by alpha where the cosine would divide
by alpha; and ramps that are steeper on the same line lr * sqrt(batch), with exponents beyond Seesaw's p = 1: 1.5 and 2
are (2^(1/4), 2^(3/2)) and (1, 4) of the paper's ablation, where Seesaw is (2^(1/2), 2).

A second, larger start batch, tuned for itself, shows what happens near and past the critical batch size, where Seesaw
is to fall behind. The critical batch is the noise scale measured in the cosine's runs; no claim rests on it.

A serial step takes as long as any other only if workers grow with the batch; on one device the time stays the same.

Source: arXiv 2510.14717: main runs at 150M to 600M parameters, its ablation of the ramps, its runs at large batches.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from effml_shared.checks import check_count
from effml_shared.citations import Paper
from effml_shared.data import DataConfig
from effml_shared.errors import ConfigError
from effml_shared.experiments import Claim, Experiment, interval
from effml_shared.runs import Run
from effml_shared.trainings import TrainingBench, TrainingConfig, best_rates, half_width, numbers
from effml_shared.transformer import TransformerConfig
from torch import nn

from effml_optim.noise_scale import NoiseScaleMonitor
from effml_optim.seesaw.plan import SeesawPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SeesawConfig", "experiment"]

Results = dict[int, dict[str, list[dict[str, Any]]]]
"""Start batch -> schedule -> result of the trial of each seed."""

COLORS = ("#6b7280", "#1f6fb4", "#c2711f", "#b3261e", "#7a4fb0", "#14713d")


@dataclass
class SeesawConfig(TrainingConfig):
    """What is trained, on what, for how long, and which ramps are tried."""

    batch_size: int = 8  # sequences per step at the start of every ramp, and of the cosine throughout
    micro_batch: int | None = 4  # sequences per forward pass: the noise scale needs two passes per step or more
    steps: int = 280  # of the cosine
    learning_rates: list[float] = field(default_factory=lambda: [2.5e-3, 5e-3, 1e-2])  # the grid, for the cosine
    kind: str = "quarter"  # of cosine: quarter (as the paper computes) or half (as most libraries have it)
    alpha: float = 1.1  # the decay of the learning rate that one change of the batch stands for
    unit: int = 1  # batches are multiples of it
    steeper: list[float] = field(default_factory=lambda: [1.5, 2.0])  # exponents p of further ramps
    far_batch_size: int | None = 64  # a second start batch, past the critical one; None: none

    def __post_init__(self) -> None:
        super().__post_init__()
        if 2.0 not in self.steeper or min(self.steeper) <= 1:
            raise ConfigError(f"steeper: got {self.steeper}, expected numbers > 1 with 2.0, the claim's, among them")
        if self.far_batch_size is not None:
            check_count("far_batch_size", self.far_batch_size, self.batch_size + 1)
        for batch_size in self.start_batches:
            self.plan(batch_size, 1.0)  # names what is wrong with kind, alpha, unit or a batch

    @property
    def samples(self) -> int:
        """Sequences of every training."""
        return self.steps * self.batch_size

    @property
    def start_batches(self) -> list[int]:
        """The start batches: the one of the claims first."""
        return [self.batch_size, *([self.far_batch_size] if self.far_batch_size else [])]

    def plan(self, batch_size: int, p: float) -> SeesawPlan:
        """Return the ramp of exponent p from a start batch; p = 0 is the cosine itself."""
        return SeesawPlan.from_cosine(
            self.samples,
            int(self.warmup * self.samples),
            batch_size,
            kind=self.kind,
            alpha=self.alpha,
            p=p,
            unit=self.unit,
            lr_within_level="step" if p else "continuous",
            allow_unstable=p > 1,
        )


def smoke() -> SeesawConfig:
    """Return a configuration that shows in seconds that everything runs; its numbers mean nothing."""
    return SeesawConfig(
        model=TransformerConfig(n_layers=1, d_model=16, n_heads=2, d_ff=32),
        data=DataConfig(seq_len=16, max_bytes=2_000_000),
        batch_size=4,
        micro_batch=2,
        steps=12,
        learning_rates=[1e-2],
        seeds=2,
        steeper=[2.0],
        far_batch_size=8,
        eval_sequences=8,
        precision="float32",
    )


def cpu() -> SeesawConfig:
    """Return the default: a byte-level model of 0.4 million parameters on the standard library's sources."""
    return SeesawConfig(model=TransformerConfig(n_layers=2, d_model=128, n_heads=4), data=DataConfig(seq_len=128))


def gpu() -> SeesawConfig:
    """Return 30 million parameters at 65 thousand tokens per step; one start batch and ramp less keep it in time."""
    return SeesawConfig(
        model=TransformerConfig(n_layers=10, d_model=512, n_heads=8),
        data=DataConfig(seq_len=1024),
        batch_size=64,
        micro_batch=32,
        unit=8,  # few shapes of the last micro-batch, for the compiler's sake
        steps=750,
        learning_rates=[1e-3, 2e-3, 4e-3],
        steeper=[2.0],
        far_batch_size=None,
        eval_sequences=512,
        compile=True,
    )


def run(config: SeesawConfig, run: Run) -> dict[str, Any]:
    """Train everything and return effects per seed, a table, and what the figures need."""
    bench = TrainingBench(config, run)
    ramps = {"cosine": 0.0, "Seesaw": 1.0, **{f"p={p:g}": p for p in sorted(config.steeper)}}
    near, *far = config.start_batches
    compared = {near: list(ramps), **{batch_size: ["cosine", "Seesaw"] for batch_size in far}}
    trainings = len(compared) * len(config.learning_rates) + config.seeds * sum(map(len, compared.values()))
    run.expect(trainings * config.samples)

    def name(schedule: str, batch_size: int, lr: float, seed: int) -> str:
        return f"{schedule}/batch={batch_size}/lr={lr:g}/seed={seed}"

    def train(schedule: str, batch_size: int, lr: float, seed: int) -> dict[str, Any]:
        plan = config.plan(batch_size, ramps[schedule])
        monitors: list[NoiseScaleMonitor] = []  # with the cosine, whose batch stays

        def watch(model: nn.Module) -> list[NoiseScaleMonitor]:
            if schedule == "cosine":
                decay = 1 - 1 / -(-plan.base_steps // 10)
                monitors.append(NoiseScaleMonitor(model.parameters(), bench.rows, decay=decay))
            return monitors

        return bench.train(
            name(schedule, batch_size, lr, seed),
            lambda model: torch.optim.AdamW(
                model.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
            ),
            plan,
            samples=config.samples,
            seed=seed,
            hooks=watch,
            measure=lambda model, evaluate: {"noise_scale": monitors[0].b_simple} if monitors else {},
        )

    tuning = {
        batch_size: {lr: train("cosine", batch_size, lr, 0)["loss"] for lr in config.learning_rates}
        for batch_size in compared
    }
    best = best_rates({f"cosine at batch {batch_size}": losses for batch_size, losses in tuning.items()})
    rates = dict(zip(compared, best.values(), strict=True))
    results: Results = {
        batch_size: {schedule: [] for schedule in schedules} for batch_size, schedules in compared.items()
    }
    for seed in range(1, config.seeds + 1):
        for batch_size, schedules in results.items():
            for schedule, rows in schedules.items():
                rows.append(train(schedule, batch_size, rates[batch_size], seed))

    cosine, seesaw, steepest = (results[near][schedule] for schedule in ("cosine", "Seesaw", "p=2"))
    return {
        "effects": {
            "loss": _above(cosine, seesaw),
            "steps": [100 * (1 - ours["steps"] / base["steps"]) for ours, base in zip(seesaw, cosine, strict=True)],
            "ramp": _above(steepest, seesaw),
        },
        "table": _table(config, rates, results),
        "tuning": {str(batch_size): list(map(list, losses.items())) for batch_size, losses in tuning.items()},
        "finals": {
            str(batch_size): {schedule: [row["loss"] for row in rows] for schedule, rows in schedules.items()}
            for batch_size, schedules in results.items()
        },
        "traced": {
            schedule: [name(schedule, near, rates[near], seed) for seed in range(1, config.seeds + 1)]
            for schedule in compared[near]
        },
    }


def _above(rows: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> list[float]:
    """Return by how many nats the final losses of `rows` lie above those of `base`, seed by seed."""
    return [row["loss"] - other["loss"] for row, other in zip(rows, base, strict=True)]


def _table(config: SeesawConfig, rates: dict[int, float], results: Results) -> list[dict[str, Any]]:
    ends = (min(config.learning_rates), max(config.learning_rates))
    table = []
    for batch_size, schedules in results.items():
        for schedule, rows in schedules.items():
            losses, gaps = [row["loss"] for row in rows], _above(rows, schedules["cosine"])
            scales = numbers([row.get("noise_scale") for row in rows])  # measured with the cosine only
            critical = None if any(map(math.isnan, scales)) else statistics.fmean(scales)
            table.append(
                {
                    "schedule": schedule,
                    "start batch": batch_size,
                    "learning rate": f"{rates[batch_size]:g}" + (" (end of grid)" if rates[batch_size] in ends else ""),
                    "held-out loss (nats)": statistics.fmean(losses),
                    "± 95%": half_width(losses),
                    "above cosine": None if schedule == "cosine" else statistics.fmean(gaps),
                    "± 95% paired": None if schedule == "cosine" else half_width(gaps),
                    "steps": round(statistics.fmean(row["steps"] for row in rows)),
                    "critical batch": critical,
                    "variance share": None if critical is None else critical / (critical + batch_size),
                }
            )
    return table


def figures(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Figure]:
    """Draw what the schedules did, the loss along the way, and the final losses."""
    from matplotlib.figure import Figure

    if "traced" not in summary:
        return {}
    trials: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if "lr" in row:  # a step, not an evaluation
            trials[row["trial"]].append(row)
    colors = dict(zip(summary["traced"], COLORS, strict=False))

    traces = Figure(figsize=(7.5, 5.0), layout="constrained")
    batches, lrs = traces.subplots(2, 1, sharex=True)
    progress = Figure(figsize=(7.5, 3.6), layout="constrained")
    by_samples, by_steps = progress.subplots(1, 2, sharey=True)
    tops = [0.0]
    for schedule, names in summary["traced"].items():
        color, steps = colors[schedule], trials[names[0]]
        ends = [0, *(row["samples"] for row in steps)]
        batches.stairs(np.diff(ends), ends, baseline=None, color=color, label=schedule)
        lrs.stairs([row["lr"] for row in steps], ends, baseline=None, color=color)
        means = _windows([trials[name] for name in names])
        for panel, key in ((by_samples, "samples"), (by_steps, "step")):
            panel.plot([row[key] for row in means], [row["loss"] for row in means], color=color, label=schedule)
        tops.append(means[len(means) // 8]["loss"])
    measured = trials[summary["traced"]["cosine"][0]]
    noise = numbers([row.get("noise_scale") for row in measured])
    batches.plot([row["samples"] for row in measured], noise, ":", color=colors["cosine"], label="critical, measured")
    batches.set(ylabel="batch (sequences)", yscale="log")
    lrs.set(xlabel="sequences", ylabel="learning rate")
    by_samples.set(xlabel="sequences", ylabel="training loss (nats)")
    by_samples.set_ylim(top=max(tops))  # the fall of the first steps would flatten all that follows
    by_steps.set(xlabel="serial optimizer steps")

    heights = [len(schedules) for schedules in summary["finals"].values()]
    final = Figure(figsize=(7.5, 1.0 + 0.45 * sum(heights)), layout="constrained")
    panels = final.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (batch_size, schedules) in zip(panels, summary["finals"].items(), strict=True):
        for place, (schedule, stored) in enumerate(schedules.items()):
            losses = [loss for loss in stored if loss is not None]  # None: diverged
            if not losses:
                continue
            mean, low, high = interval(losses)
            error = [[mean - low], [high - mean]] if math.isfinite(low) else None
            panel.errorbar(mean, -place, xerr=error, fmt="o", color=colors[schedule], capsize=4)
            panel.plot(losses, [-place] * len(losses), ".", color="black", markersize=4)
        panel.set_yticks([-place for place in range(len(schedules))], list(schedules))
        panel.set_ylim(0.5 - len(schedules), 0.5)
        panel.set_title(f"from batch {batch_size}", fontsize=9, loc="left")
    panels[-1].set_xlabel("held-out loss (nats)")

    for panel in (batches, lrs, by_samples, by_steps, *panels):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    batches.legend(frameon=False)
    by_steps.legend(frameon=False)
    return {
        "Schedules: batch and learning rate against sequences (dotted: the noise scale in the cosine's run)": traces,
        "Progress: training loss against sequences, where the cost is, and against serial steps": progress,
        "Final loss: mean and 95% interval over seeds (dots)": final,
    }


def _windows(runs: list[list[dict[str, Any]]], count: int = 40) -> list[dict[str, float]]:
    """Average all runs over equal windows of samples, each step with the weight of its batch."""
    width = max(row["samples"] for rows in runs for row in rows) / count
    windows: dict[int, list[tuple[dict[str, Any], int]]] = defaultdict(list)
    for rows in runs:
        for before, row in pairwise([{"samples": 0}, *rows]):
            windows[math.ceil(row["samples"] / width)].append((row, row["samples"] - before["samples"]))
    return [
        {
            key: statistics.fmean([row[key] for row, _ in windows[at]], [size for _, size in windows[at]])
            for key in ("samples", "step", "loss")
        }
        for at in sorted(windows)
    ]


experiment = Experiment(
    name="optim.seesaw",
    title="Seesaw trains to the cosine's loss in 30% fewer serial steps at equal FLOPs",
    paper="Seesaw, arXiv 2510.14717",
    presets={"smoke": smoke, "cpu": cpu, "gpu": gpu},
    minutes={"smoke": "5 s", "cpu": "4 min", "gpu": "not measured"},
    run=run,
    claims=(
        Claim(
            "loss",
            "Seesaw ends at the cosine's loss: not more than 0.01 nats above it",
            "0.0079 nats below to 0.0121 above, in 11 settings of 150M to 600M parameters, alpha 1.1",
            " nats, cosine minus Seesaw",
            at_least=-0.01,
        ),
        Claim(
            "steps",
            "Seesaw takes about a third fewer serial steps: 30%, what levels of alpha 1.1 leave of the limit, 32.7%",
            "about 36%, the limit of the quarter cosine without warm-up",
            "% fewer steps",
            at_least=30.0,
        ),
        Claim(
            "ramp",
            "A ramp twice as steep, batch x 4 at a constant learning rate, ends above Seesaw",
            "figure only: at 150M the ramps beyond Seesaw fall behind",
            " nats above Seesaw",
            at_least=0.0,
        ),
    ),
    figures=figures,
    papers=(
        Paper(
            "Seesaw: Accelerating Training by Balancing Learning Rate and Batch Size Scheduling",
            "2510.14717",
            (
                "Alexandru Meterez",
                "Depen Morwani",
                "Jingfeng Wu",
                "Costin-Andrei Oncescu",
                "Cengiz Pehlevan",
                "Sham Kakade",
            ),
        ),
    ),
)
