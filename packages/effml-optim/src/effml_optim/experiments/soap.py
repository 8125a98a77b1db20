"""`optim.soap`: how many steps, and how much time, SOAP saves over AdamW on real text, and how it bears a stale basis.

Protocol. Every method trains the same model on the same batches under the same cosine schedule; its learning rate is
the best of one common grid at a tuning seed that no claim uses. Then, per seed: AdamW and Shampoo at the full budget;
SOAP at several fractions of it, each with its own full schedule (a run that is merely cut short would still have a
high learning rate). The SOAP budget that reaches AdamW's final held-out loss is interpolated between these fractions.
Matrices go to the method, everything else to AdamW within the same optimizer.

Source: Vyas et al., arXiv 2409.11321, sections 5 and 6; the method of measuring savings is that of its section 5.2.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from effml_shared.checks import check_count
from effml_shared.citations import Paper
from effml_shared.data import DataConfig
from effml_shared.errors import ConfigError
from effml_shared.experiments import Claim, Experiment, interval
from effml_shared.runs import Run
from effml_shared.schedules import cosine
from effml_shared.trainings import TrainingBench, TrainingConfig, best_rates, half_width, numbers
from effml_shared.transformer import TransformerConfig
from torch import nn

from effml_optim.param_groups import split_params
from effml_optim.shampoo import Shampoo
from effml_optim.soap import SOAP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SoapConfig", "experiment", "reached_fraction"]

METHODS = ("AdamW", "Shampoo", "SOAP")


@dataclass
class SoapConfig(TrainingConfig):
    """What is trained, on what, for how long, and what is tried; the grid of learning rates is one for all methods."""

    fractions: list[float] = field(default_factory=lambda: [0.5, 0.7, 1.0])  # of the budget, for SOAP
    frequency: int = 10  # steps between refreshes of the basis
    stale_frequency: int = 40  # the same in the ablation
    betas: list[float] = field(default_factory=lambda: [0.95, 0.95])  # of every method
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("frequency", "stale_frequency"):
            check_count(name, getattr(self, name), 1)
        if not self.fractions or max(self.fractions) != 1.0 or min(self.fractions) <= 0:
            raise ConfigError(f"fractions: got {self.fractions}, expected numbers in (0, 1] with 1.0 among them")
        if len(self.betas) != 2:
            raise ConfigError(f"betas: got {self.betas}, expected two numbers")

    def samples(self, fraction: float) -> int:
        """Return the sequences of a run at a fraction of the budget."""
        return max(1, round(self.steps * fraction)) * self.batch_size


def smoke() -> SoapConfig:
    """Return a configuration that shows in seconds that everything runs; its numbers mean nothing."""
    return SoapConfig(
        model=TransformerConfig(n_layers=1, d_model=16, n_heads=2, d_ff=32),
        data=DataConfig(seq_len=16, max_bytes=2_000_000),
        batch_size=4,
        steps=6,
        learning_rates=[1e-2],
        seeds=2,
        fractions=[0.5, 1.0],
        frequency=2,
        stale_frequency=4,
        eval_sequences=8,
        precision="float32",
    )


def cpu() -> SoapConfig:
    """Return the default: a byte-level model of 0.4 million parameters on the standard library's sources."""
    return SoapConfig(model=TransformerConfig(n_layers=2, d_model=128, n_heads=4), data=DataConfig(seq_len=128))


def gpu() -> SoapConfig:
    """Return a size at which the paper's regime begins: 25 million parameters, 131 thousand tokens per step."""
    return SoapConfig(
        model=TransformerConfig(n_layers=8, d_model=512, n_heads=8),
        data=DataConfig(seq_len=1024),
        batch_size=128,
        micro_batch=64,
        steps=400,
        fractions=[0.4, 0.55, 0.7, 1.0],
        stale_frequency=100,
        learning_rates=[1e-3, 2e-3, 4e-3, 8e-3],
        eval_sequences=512,
        compile=True,
    )


@dataclass(frozen=True)
class _Setting:
    """One training of the experiment."""

    method: str
    lr: float
    seed: int
    fraction: float = 1.0
    frequency: int = 0  # of the basis; 0 for AdamW, which has none

    @property
    def name(self) -> str:
        parts = [f"lr={self.lr:g}", f"f={self.frequency}", f"budget={self.fraction:g}", f"seed={self.seed}"]
        return "/".join([self.method, *(part for part in parts if part != "f=0")])


def _train(bench: TrainingBench, config: SoapConfig, setting: _Setting) -> dict[str, Any]:
    samples = config.samples(setting.fraction)
    schedule = cosine(config.batch_size, samples, warmup=int(config.warmup * samples), floor=0.1)
    optimizer = partial(_optimizer, setting, config)
    return bench.train(setting.name, optimizer, schedule, samples=samples, seed=setting.seed)


def _optimizer(setting: _Setting, config: SoapConfig, model: nn.Module) -> torch.optim.Optimizer:
    groups = split_params(model)
    shared: dict[str, Any] = {"lr": setting.lr, "betas": tuple(config.betas), "weight_decay": config.weight_decay}
    if setting.method == "AdamW":
        plain = [
            {"params": g["params"], **({"weight_decay": g["weight_decay"]} if "weight_decay" in g else {})}
            for g in groups
        ]
        return torch.optim.AdamW(plain, **shared, fused=True)
    method = {"SOAP": SOAP, "Shampoo": Shampoo}[setting.method]
    return method(groups, **shared, precondition_frequency=setting.frequency)


def run(config: SoapConfig, run: Run) -> dict[str, Any]:
    """Train everything and return effects per seed, a table, and what the figures need."""
    bench = TrainingBench(config, run)
    refresh = {"AdamW": 0, "Shampoo": config.frequency, "SOAP": config.frequency}
    full_runs = len(METHODS) * len(config.learning_rates) + 4 * config.seeds  # tuning; AdamW, Shampoo, two stale ones
    of_soap = config.seeds * sum(config.samples(fraction) for fraction in config.fractions)
    run.expect(full_runs * config.samples(1.0) + of_soap)

    tuning = {
        method: {
            lr: _train(bench, config, _Setting(method, lr, 0, frequency=refresh[method]))["loss"]
            for lr in config.learning_rates
        }
        for method in METHODS
    }
    best = best_rates(tuning)
    finals: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    stale: dict[str, list[dict[str, Any]]] = {"Shampoo": [], "SOAP": []}
    soap: dict[float, list[dict[str, Any]]] = {fraction: [] for fraction in sorted(config.fractions)}
    for seed in range(1, config.seeds + 1):  # method after method within a seed: a machine's drift meets all alike

        def measure(method: str, frequency: int, fraction: float = 1.0, seed: int = seed) -> dict[str, Any]:
            return _train(bench, config, _Setting(method, best[method], seed, fraction, frequency))

        for method in METHODS:
            finals[method].append(measure(method, refresh[method]))
        for fraction, rows in soap.items():
            rows.append(measure("SOAP", config.frequency, fraction))
        for method, rows in stale.items():
            rows.append(measure(method, config.stale_frequency))

    step_seconds = {
        method: statistics.fmean(r["seconds"] / r["steps"] for r in rows) for method, rows in finals.items()
    }
    reached = [
        reached_fraction(list(soap), [rows[i]["loss"] for rows in soap.values()], finals["AdamW"][i]["loss"])
        for i in range(config.seeds)
    ]
    slowdown = [
        (ours["seconds"] / ours["steps"]) / (adam["seconds"] / adam["steps"])
        for ours, adam in zip(finals["SOAP"], finals["AdamW"], strict=True)
    ]
    lost = {m: [s["loss"] - f["loss"] for s, f in zip(stale[m], finals[m], strict=True)] for m in stale}
    ends = (min(config.learning_rates), max(config.learning_rates))
    return {
        "effects": {
            "steps": [100 * (1 - fraction) for fraction in reached],
            "time": [100 * (1 - fraction * slower) for fraction, slower in zip(reached, slowdown, strict=True)],
            "staleness": [shampoo - ours for shampoo, ours in zip(lost["Shampoo"], lost["SOAP"], strict=True)],
        },
        "table": [
            {
                "method": method,
                "learning rate": f"{best[method]:g}" + (" (end of grid)" if best[method] in ends else ""),
                "held-out loss (nats)": statistics.fmean(r["loss"] for r in finals[method]),
                "± 95%": half_width([r["loss"] for r in finals[method]]),
                f"loss at f={config.stale_frequency}": statistics.fmean(r["loss"] for r in stale[method])
                if method in stale
                else None,
                "ms per step": 1000 * step_seconds[method],
                "share of AdamW's steps": statistics.fmean(reached) if method == "SOAP" else None,
            }
            for method in METHODS
        ],
        "tuning": {method: [[lr, loss] for lr, loss in losses.items()] for method, losses in tuning.items()},
        "curve": {f"{fraction:g}": [row["loss"] for row in rows] for fraction, rows in soap.items()},
        "finals": {method: [row["loss"] for row in rows] for method, rows in finals.items()},
        "lost": lost,
        "frequencies": [config.frequency, config.stale_frequency],
    }


def reached_fraction(fractions: Sequence[float], losses: Sequence[float], target: float) -> float:
    """Return the fraction of the budget at which the loss first meets a target, linear in the log of the budget.

    Where it is met before the smallest fraction, that fraction is returned; where never, 1: both understate a saving.

    >>> reached_fraction([0.25, 0.5, 1.0], [3.0, 2.0, 1.0], 2.0)
    0.5
    """
    if losses[0] <= target:
        return fractions[0]
    for (low, above), (high, below) in zip(
        zip(fractions, losses, strict=True), list(zip(fractions, losses, strict=True))[1:], strict=False
    ):
        if above > target >= below:
            return low * (high / low) ** ((above - target) / (above - below)) if math.isfinite(above) else high
    return 1.0


def figures(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Figure]:
    """Draw budget against loss, the price of a stale basis, and the learning-rate grid."""
    from matplotlib.figure import Figure

    if "curve" not in summary:
        return {}
    colors = {"AdamW": "#6b7280", "Shampoo": "#c2711f", "SOAP": "#1f6fb4"}

    saving = Figure(figsize=(7.5, 4.0))
    axes = saving.add_subplot()
    fractions = [float(fraction) for fraction in summary["curve"]]
    curve, finals, lost = (
        {name: numbers(row) for name, row in summary[k].items()} for k in ("curve", "finals", "lost")
    )
    for losses in zip(*curve.values(), strict=True):
        axes.plot(fractions, losses, ".-", color=colors["SOAP"], alpha=0.35, linewidth=1)
    means = [statistics.fmean(losses) for losses in curve.values()]
    axes.plot(fractions, means, "o-", color=colors["SOAP"], label="SOAP, each point a full schedule (thin: seeds)")
    for method in ("AdamW", "Shampoo"):
        mean, low, high = interval(finals[method])
        axes.axhline(mean, color=colors[method], label=f"{method} at the full budget")
        if math.isfinite(low):
            axes.axhspan(low, high, color=colors[method], alpha=0.12, linewidth=0)
    axes.set(xlabel="share of AdamW's steps", ylabel="held-out loss (nats per byte or token)")

    price = Figure(figsize=(7.5, 3.2))
    bars = price.add_subplot()
    fresh, stale = summary["frequencies"]
    for place, method in enumerate(lost):
        mean, low, high = interval(lost[method])
        error = [[mean - low], [high - mean]] if math.isfinite(low) else None
        bars.barh(place, mean, xerr=error, color=colors[method], alpha=0.85, height=0.55, capsize=4)
        bars.plot(lost[method], [place] * len(lost[method]), ".", color="black", markersize=4)
    bars.set_yticks(range(len(lost)), list(lost))
    bars.axvline(0, color="black", linewidth=0.8)
    bars.set(xlabel=f"loss added when the basis is refreshed every {stale} steps instead of {fresh} (nats)")

    grid = Figure(figsize=(7.5, 3.2))
    curves = grid.add_subplot()
    for method, points in summary["tuning"].items():
        curves.plot(
            [lr for lr, _ in points], numbers([loss for _, loss in points]), "o-", color=colors[method], label=method
        )
    curves.set(xscale="log", xlabel="learning rate", ylabel="held-out loss (nats)")

    for panel in (axes, bars, curves):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25)
    axes.legend(frameon=False)
    curves.legend(frameon=False)
    return {
        "Saving: held-out loss of SOAP at a share of AdamW's steps": saving,
        "Staleness: what an old basis costs (mean, 95% interval, seeds)": price,
        "Tuning: the learning-rate grid at the tuning seed": grid,
    }


experiment = Experiment(
    name="optim.soap",
    title="SOAP reaches AdamW's loss in at least 40% fewer steps and 35% less time",
    paper="Vyas et al., SOAP, arXiv 2409.11321",
    presets={"smoke": smoke, "cpu": cpu, "gpu": gpu},
    minutes={"smoke": "5 s", "cpu": "5 min", "gpu": "not measured"},
    run=run,
    claims=(
        Claim(
            "steps",
            "SOAP reaches AdamW's final loss in at least 40% fewer steps",
            "40% or more at 360m and 660m, 2m-token batches",
            "% fewer steps",
            at_least=40.0,
        ),
        Claim(
            "time",
            "SOAP needs at least 35% less wall-clock time for the same",
            "35% or more, one H100",
            "% less time",
            at_least=35.0,
        ),
        Claim(
            "staleness",
            "SOAP degrades more slowly than Shampoo as the basis gets stale",
            "figure only: SOAP's loss grows less for f = 10 to 100",
            " nats less added loss",
            at_least=0.0,
        ),
    ),
    figures=figures,
    papers=(
        Paper(
            "SOAP: Improving and Stabilizing Shampoo using Adam",
            "2409.11321",
            (
                "Nikhil Vyas",
                "Depen Morwani",
                "Rosie Zhao",
                "Mujin Kwun",
                "Itai Shapira",
                "David Brandfonbrener",
                "Lucas Janson",
                "Sham Kakade",
            ),
        ),
    ),
)
