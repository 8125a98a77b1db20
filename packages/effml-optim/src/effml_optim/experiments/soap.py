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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from effml_shared import distributed, seeding
from effml_shared.data import Batch, DataConfig, Loader, PackedDataset, StreamingLoader, open_data
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.experiments import Claim, Experiment, interval
from effml_shared.loop import Budget, Loop
from effml_shared.runs import Run, Trial
from effml_shared.schedules import cosine
from effml_shared.steps import GradientStep, faster_precision, language_model_loss
from effml_shared.transformer import Transformer, TransformerConfig

from effml_optim.param_groups import split_params
from effml_optim.shampoo import Shampoo
from effml_optim.soap import SOAP

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SoapConfig", "experiment", "reached_fraction"]

METHODS = ("AdamW", "Shampoo", "SOAP")


@dataclass
class SoapConfig:
    """What is trained, on what, for how long, and what is tried."""

    model: TransformerConfig = field(default_factory=TransformerConfig)  # vocab_size: the tokenizer's
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: int = 16  # sequences per step
    micro_batch: int | None = None  # sequences per forward pass; None: all
    steps: int = 150  # the full budget
    warmup: float = 0.1  # fraction of each run's steps
    learning_rates: list[float] = field(default_factory=lambda: [2.5e-3, 5e-3, 1e-2, 2e-2])  # grid, one for all methods
    seeds: int = 3  # measured, besides the one for tuning
    fractions: list[float] = field(default_factory=lambda: [0.5, 0.7, 1.0])  # of the budget, for SOAP
    frequency: int = 10  # steps between refreshes of the basis
    stale_frequency: int = 40  # the same in the ablation
    betas: list[float] = field(default_factory=lambda: [0.95, 0.95])  # of every method
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    eval_sequences: int = 256  # held out, evaluated at the end of every run
    precision: str = "auto"  # float32, bfloat16 (autocast), or auto: the faster on this machine
    compile: bool = False  # of the model's forward and backward pass

    def __post_init__(self) -> None:
        for name in ("batch_size", "micro_batch", "steps", "seeds", "frequency", "stale_frequency", "eval_sequences"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}: got {value}, expected an integer >= 1")
        if not self.clip_norm > 0:
            raise ConfigError(f"clip_norm: got {self.clip_norm}, expected a number > 0")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ConfigError(f"learning_rates: got {self.learning_rates}, expected one or more numbers > 0")
        if not self.fractions or max(self.fractions) != 1.0 or min(self.fractions) <= 0:
            raise ConfigError(f"fractions: got {self.fractions}, expected numbers in (0, 1] with 1.0 among them")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup: got {self.warmup}, expected a fraction in [0, 1)")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ConfigError(f"precision: got {self.precision!r}, expected 'auto', 'float32' or 'bfloat16'")
        if len(self.betas) != 2:
            raise ConfigError(f"betas: got {self.betas}, expected two numbers")


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


class _Bench:
    """The model, data and budget that all trials share."""

    def __init__(self, config: SoapConfig, run: Run) -> None:
        self.config, self.run = config, run
        self.device = distributed.default_device()
        self.data, self.held_out = self._open(0)
        tokenizer = self.held_out.tokenizer
        self.model_config = replace(config.model, vocab_size=tokenizer.vocab_size)
        stored = run.summary.get("precision")  # a resumed run keeps what its first session measured
        self.precision = stored or (self._measure() if config.precision == "auto" else config.precision)
        run.update(precision=self.precision)

    def _open(self, seed: int) -> tuple[Loader | StreamingLoader, PackedDataset]:
        config = replace(self.config.data, seed=seeding.derive_seed(seed, "data"))
        return open_data(config, rank=distributed.rank(), world_size=distributed.world_size())

    def _data(self, seed: int) -> Loader | StreamingLoader:
        """Return the training data in the order of a seed, from its start; what is in memory is not read again."""
        if isinstance(self.data, StreamingLoader):
            return self._open(seed)[0]
        order: dict[str, Any] = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        return Loader(self.data.dataset, seed=seeding.derive_seed(seed, "data"), **order)

    def _model(self, seed: int) -> Transformer:
        return Transformer(self.model_config, seed=seeding.derive_seed(seed, "model")).to(self.device)

    def _measure(self) -> str:
        rows = torch.arange(min(self.config.micro_batch or self.config.batch_size, len(self.held_out)))
        return faster_precision(self._model(0), _loss, self.held_out.batch(rows.numpy()))

    def train(self, setting: _Setting) -> dict[str, Any]:
        """Train once, unless the run has done so already; returns final held-out loss, steps and seconds.

        A training that meets NaN or infinity has an infinite loss: it counts against its learning rate and method.
        """
        result = self.run.trial(setting.name, lambda trial: self._train(setting, trial))
        return {**result, "loss": math.inf if result["loss"] is None else result["loss"]}

    def samples(self, fraction: float) -> int:
        return max(1, round(self.config.steps * fraction)) * self.config.batch_size

    def _train(self, setting: _Setting, trial: Trial) -> dict[str, Any]:
        config, samples = self.config, self.samples(setting.fraction)
        model = distributed.parallelize(self._model(setting.seed), "ddp")
        step = GradientStep(
            model,
            _optimizer(setting, model, config),
            _loss,
            micro_batch=config.micro_batch,
            clip_norm=config.clip_norm,
            precision=self.precision,
            compile=config.compile,
        )
        loop = Loop(
            step,
            self._data(setting.seed),
            cosine(config.batch_size, samples, warmup=int(config.warmup * samples), floor=0.1),
            budget=Budget(samples=samples),
            hooks=trial.hooks,
            evaluate=lambda: step.evaluate(self._held_out_batches()),
            checkpoints=trial.checkpoints,
            seed=setting.seed,
        )
        try:
            clock, loss = loop.run(), loop.evaluation["loss"]
        except NonFiniteError:
            clock, loss = loop.clock, math.inf
        return {
            "method": setting.method,
            "loss": loss,
            "steps": max(clock.step, 1),
            "seconds": clock.seconds,
            "samples": clock.samples,
        }

    def _held_out_batches(self) -> Iterator[Batch]:
        indices = torch.arange(min(self.config.eval_sequences, len(self.held_out)))
        mine = indices[distributed.rank() :: distributed.world_size()]
        for rows in mine.split(self.config.micro_batch or self.config.batch_size):
            yield self.held_out.batch(rows.numpy())


def _loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Let attention run across document borders: that needs no mask, and so the fastest kernels serve."""
    return language_model_loss(model, {"input_ids": batch["input_ids"], "labels": batch["labels"]})


def _optimizer(setting: _Setting, model: torch.nn.Module, config: SoapConfig) -> torch.optim.Optimizer:
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
    bench = _Bench(config, run)
    refresh = {"AdamW": 0, "Shampoo": config.frequency, "SOAP": config.frequency}
    full_runs = len(METHODS) * len(config.learning_rates) + 4 * config.seeds  # tuning; AdamW, Shampoo, two stale ones
    of_soap = config.seeds * sum(bench.samples(fraction) for fraction in config.fractions)
    run.expect(full_runs * bench.samples(1.0) + of_soap)

    tuning = {
        method: {
            lr: bench.train(_Setting(method, lr, 0, frequency=refresh[method]))["loss"] for lr in config.learning_rates
        }
        for method in METHODS
    }
    best = {method: min(losses, key=lambda lr: losses[lr]) for method, losses in tuning.items()}
    if diverged := [method for method in METHODS if not math.isfinite(tuning[method][best[method]])]:
        raise ConfigError(f"learning_rates: {', '.join(diverged)} diverged at every one, expected smaller ones as well")

    finals: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    stale: dict[str, list[dict[str, Any]]] = {"Shampoo": [], "SOAP": []}
    soap: dict[float, list[dict[str, Any]]] = {fraction: [] for fraction in sorted(config.fractions)}
    for seed in range(1, config.seeds + 1):  # method after method within a seed: a machine's drift meets all alike

        def measure(method: str, frequency: int, fraction: float = 1.0, seed: int = seed) -> dict[str, Any]:
            return bench.train(_Setting(method, best[method], seed, fraction, frequency))

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
                "± 95%": _half_width([r["loss"] for r in finals[method]]),
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


def _half_width(values: Sequence[float]) -> float | None:
    mean, low, _ = interval(values)
    return mean - low if math.isfinite(low) else None


def _numbers(values: Sequence[float | None]) -> list[float]:
    """Return stored numbers with NaN where a training diverged, which leaves a gap in a plot."""
    return [math.nan if value is None else value for value in values]


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
        {name: _numbers(row) for name, row in summary[k].items()} for k in ("curve", "finals", "lost")
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
            [lr for lr, _ in points], _numbers([loss for _, loss in points]), "o-", color=colors[method], label=method
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
)
