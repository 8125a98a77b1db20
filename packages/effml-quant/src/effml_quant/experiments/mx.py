"""`quant.mx`: what training in block-scaled formats does to the gradient and to the loss, and what mends it.

Protocol, in three parts that share nothing but the formats.
Bias: the student-teacher proxy is trained in float32; at given steps the gradient under every scheme is compared with
the exact one at the same weights, on the same fresh batches. At one step the gains of its norms are also moved along
their exact symmetry, which changes nothing in float32 and decides in low precision which gains share a code.
Interventions: the proxy is trained from the same weights on the same batches and targets in float32 and in a format,
and from a mid step of the latter on under every intervention, weights and moments kept.
Matrix: a small language model on real text, weights x activations and what else is proposed, each with the best
learning rate of one grid at a tuning seed that no claim uses, the same budget and the same batches. As in the paper:
AdamW (betas 0.9 and 0.95, eps 1e-15, no decay), clipping at 1, a cosine to 10% after a fifth of warm-up, gains of norms
in the weights' format, the output head included, attention products left alone.

The paper's main finding, that such runs spike beyond recovery, appears at sizes and lengths that are not reached below
the `gpu` preset: there is a claim for it, which smaller presets leave open.
Source: arXiv 2506.20752; the gain-rescaling test, the same-point comparison at several steps and the sizes that count
as holding for these are ours.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from effml_shared.citations import Paper
from effml_shared.data import DataConfig
from effml_shared.errors import ConfigError
from effml_shared.experiments import Claim, Experiment
from effml_shared.runs import Run
from effml_shared.schedules import cosine
from effml_shared.trainings import TrainingBench, TrainingConfig, best_rates
from effml_shared.transformer import TransformerConfig
from torch import nn

from effml_quant.experiments.mx_figures import figures
from effml_quant.experiments.mx_proxy import (
    E4M3,
    BiasStudy,
    DualStudy,
    all_mx,
    continue_training,
    train_and_measure,
    train_exact,
    train_quantised,
)
from effml_quant.experiments.mx_table import FP32, bias_rows, dual_rows, matrix_rows, short_name
from effml_quant.formats import find_format
from effml_quant.instability.spikes import find_spikes
from effml_quant.precision.application import apply_scheme
from effml_quant.precision.scheme import PrecisionScheme

__all__ = ["MXConfig", "bias_effects", "dual_spikes", "experiment", "loss_gap", "switch_gain"]

EIGHT_BITS = ("E4M3 x E4M3", "E5M2 x E5M2", "E4M3 forward, E5M2 backward", "E4M3, rceil, norms exempt")
REMEDIES = ("E4M3 x bf16", "E4M3 forward only")


@dataclass
class MXConfig(TrainingConfig):
    """The language model of the matrix (inherited fields), and the two studies on the proxy."""

    bias: BiasStudy = field(default_factory=BiasStudy)
    dual: DualStudy = field(default_factory=DualStudy)
    weights: list[str] = field(default_factory=lambda: [E4M3, "mxfp4", "bfloat16"])  # rows of the matrix
    activations: list[str] = field(default_factory=lambda: [E4M3, "mxfp4", "bfloat16"])  # columns; gradients follow
    precision: str = "float32"  # what a scheme leaves alone

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weights", "activations"):
            formats = [find_format(fmt).name for fmt in getattr(self, name)]
            if E4M3 not in formats or len(set(formats)) < len(formats):
                raise ConfigError(f"{name}: got {formats}, expected different formats, {E4M3} among them")
        if "bfloat16" not in [find_format(fmt).name for fmt in self.activations]:
            raise ConfigError(f"activations: got {self.activations}, expected bfloat16 among them")

    def schemes(self) -> dict[str, PrecisionScheme | None]:
        """Return what the language model is trained in, by name."""
        cells = {cell_name(w, a): _cell(w, a) for w in self.weights for a in self.activations}
        mixed = PrecisionScheme.mx_mix(norm_affine=E4M3)
        return {
            FP32: None,
            **cells,
            "E4M3 forward only": all_mx(quantize_backward=False),
            "E4M3 forward, E5M2 backward": mixed,
            "E4M3, rceil, norms exempt": PrecisionScheme.recommended(),
        }

    @property
    def is_papers_size(self) -> bool:
        """Whether the proxy is as large, and trained as long, as where the paper sees it spike."""
        return self.dual.width >= 512 and self.dual.steps >= 5500


def cell_name(weight: str, activation: str) -> str:
    """Return the name of a cell of the matrix.

    >>> cell_name("mxfp8_e4m3", "bf16")
    'E4M3 x bf16'
    """
    return f"{short_name(weight)} x {short_name(activation)}"


def _cell(weight: str, activation: str) -> PrecisionScheme:
    return PrecisionScheme(w_fwd=weight, a_fwd=activation, norm_affine=weight)


def _model(layers: int) -> TransformerConfig:
    """Return the paper's model of so many layers: 64 channels for each, heads of 64, plain LayerNorm and GELU."""
    width = 64 * layers
    return TransformerConfig(
        n_layers=layers,
        d_model=width,
        n_heads=layers,
        d_ff=4 * width,
        norm="layer",
        norm_eps=1e-5,
        qk_norm="head",
        mlp="gelu",
    )


def smoke() -> MXConfig:
    """Return a configuration that shows in seconds that everything runs; its numbers mean nothing."""
    return MXConfig(
        model=TransformerConfig(n_layers=1, d_model=32, n_heads=1, d_ff=32, norm="layer", mlp="gelu"),
        data=DataConfig(seq_len=16, max_bytes=2_000_000),
        batch_size=2,
        steps=2,
        learning_rates=[1e-2],
        seeds=1,
        eval_sequences=4,
        weights=[E4M3],
        activations=[E4M3, "bfloat16"],
        bias=BiasStudy(
            32,
            1,
            32,
            steps=4,
            measure_at=[0, 4],
            probe_batches=1,
            rescale_at=4,
            factors=[1.0, 0.97],
            rescale_batches=1,
            seeds=2,
        ),
        dual=DualStudy(
            32,
            1,
            32,
            steps=6,
            switch_at=3,
            formats=["mxfp4"],
            interventions=["bf16_act_all"],
            eval_batch_size=32,
            seeds=1,
        ),
    )


def cpu() -> MXConfig:
    """Return the default: 64 and 32 wide proxies, and two layers on the standard library's sources."""
    return MXConfig(
        model=_model(2),
        data=DataConfig(seq_len=64),
        batch_size=8,
        steps=50,
        warmup=0.2,
        learning_rates=[2e-3, 5e-3, 1e-2],
        eval_sequences=64,
        bias=BiasStudy(steps=500, measure_at=[0, 100, 500]),
    )


def gpu() -> MXConfig:
    """Return the paper's proxy run and its smallest language model, on 1.6 million bytes per run.

    The proxy has one seed, which shows whether it spikes and proves nothing: with `dual.seeds=3` it takes far longer.
    """
    formats = ["mxfp6_e2m3", E4M3, "mxfp8_e5m2", "bfloat16"]
    return MXConfig(
        model=_model(4),
        data=DataConfig(seq_len=512),
        batch_size=64,
        steps=50,
        warmup=0.2,
        learning_rates=[2e-3, 5e-3],
        eval_sequences=128,
        weights=formats,
        activations=formats,
        dual=DualStudy(
            width=512,
            depth=4,
            batch_size=2048,
            lr=6e-4,
            steps=9000,
            switch_at=4500,
            formats=[E4M3],
            interventions=["bf16_act_all"],
            eval_batch_size=2048,
            seeds=1,
            compile=True,
        ),
    )


def run(config: MXConfig, run: Run) -> dict[str, Any]:
    """Train everything and return effects per seed, a table, and what the figures need."""
    run.expect(_samples(config))
    biases = [
        run.trial(f"proxy bias/seed={seed}", partial(train_and_measure, config.bias, seed))
        for seed in _seeds(config.bias)
    ]
    duals = {seed: _dual(run, config.dual, seed) for seed in _seeds(config.dual)}
    rates, losses, tuning = _matrix(run, config)

    spikes = {seed: dual_spikes(run.metrics(), config.dual, seed) for seed in duals}
    first = config.dual.formats[0]
    more = [float(found[short_name(first)] - found[FP32]) for found in spikes.values()]
    eight, remedies = ([name for name in names if name in losses] for names in (EIGHT_BITS, REMEDIES))
    return {
        "effects": {
            **bias_effects(config.bias, biases),
            "switch": [switch_gain(dual, short_name(config.dual.formats[-1])) for dual in duals.values()],
            "gap": loss_gap(losses, eight),
            "remedy": loss_gap(losses, remedies),
            "spikes": more if config.is_papers_size else [None] * len(more),
        },
        "table": [
            *bias_rows(config.bias, biases),
            *dual_rows(config.dual, duals),
            *matrix_rows(config.learning_rates, rates, losses),
        ],
        "rho": [bias["rho"] for bias in biases],
        "rescaled": [bias["rescaled"] for bias in biases],
        "duals": list(duals.values()),
        "spikes": list(spikes.values()),
        "matrix": losses,
        "tuning": {name: list(map(list, found.items())) for name, found in tuning.items()},
        "shape": {
            "weights": list(map(short_name, config.weights)),
            "activations": list(map(short_name, config.activations)),
            "traces": {short_name(fmt): _traces(config.dual, fmt) for fmt in config.dual.formats},
        },
    }


def _seeds(study: BiasStudy | DualStudy) -> range:
    return range(1, study.seeds + 1)


def _samples(config: MXConfig) -> int:
    dual = config.dual
    branches = len(dual.formats) * (dual.switch_at + len(dual.branches) * dual.steps)  # a branch's clock starts mid-way
    trainings = len(config.schemes()) * (len(config.learning_rates) + config.seeds)
    return (
        config.bias.seeds * config.bias.steps * config.bias.batch_size
        + dual.seeds * (dual.steps + branches) * dual.batch_size
        + trainings * config.steps * config.batch_size
    )


def _dual(run: Run, study: DualStudy, seed: int) -> dict[str, Any]:
    """Return final losses of one seed: of float32, and by format of every branch; None where it diverged."""
    exact = run.trial(_dual_name(FP32, "", seed), partial(train_exact, study, seed))
    found: dict[str, Any] = {FP32: exact["loss"]}
    for fmt in study.formats:
        kept = run.path / "checkpoints" / f"kept {short_name(fmt)} seed={seed}"
        before = run.trial(_dual_name(short_name(fmt), "", seed), partial(train_quantised, study, fmt, seed, kept=kept))
        found[short_name(fmt)] = dict.fromkeys(study.branches)
        if before["loss"] is not None:
            for branch in study.branches:
                train = partial(continue_training, study, fmt, branch, seed, kept=kept)
                found[short_name(fmt)][branch] = run.trial(_dual_name(short_name(fmt), branch, seed), train)["loss"]
    return found


def _dual_name(fmt: str, branch: str, seed: int) -> str:
    return "/".join(["proxy " + fmt, *([branch] if branch else []), f"seed={seed}"])


def _traces(study: DualStudy, fmt: str) -> dict[str, list[str]]:
    """Return the trials of the first seed whose training losses a figure shows, one after the other, by branch."""
    before = _dual_name(short_name(fmt), "", 1)
    return {FP32: [_dual_name(FP32, "", 1)]} | {b: [before, _dual_name(short_name(fmt), b, 1)] for b in study.branches}


def dual_spikes(rows: Sequence[Mapping[str, Any]], study: DualStudy, seed: int) -> dict[str, int]:
    """Count the spikes of the training loss of one seed in float32 and, left alone, in every format.

    The rule of `find_spikes` is meant for nats; a squared error spikes where its logarithm does.
    """

    def count(*trials: str) -> int:
        losses = [
            row["proxy_loss"] for trial in trials for row in rows if row["trial"] == trial and "proxy_loss" in row
        ]
        return len(find_spikes([math.log(loss) if loss else math.nan for loss in losses]))

    names = {
        short_name(fmt): [_dual_name(short_name(fmt), branch, seed) for branch in ("", "none")] for fmt in study.formats
    }
    return {FP32: count(_dual_name(FP32, "", seed))} | {fmt: count(*trials) for fmt, trials in names.items()}


def _matrix(
    run: Run, config: MXConfig
) -> tuple[dict[str, float], dict[str, list[float]], dict[str, dict[float, float]]]:
    """Return learning rates, final held-out losses by seed (infinite: diverged) and the grid, by scheme."""
    bench = TrainingBench(config, run)
    samples = config.steps * config.batch_size
    schedule = cosine(config.batch_size, samples, warmup=int(config.warmup * samples), floor=0.1)
    schemes = config.schemes()

    def train(name: str, lr: float, seed: int) -> float:
        optimizer = partial(_optimizer, schemes[name], lr)
        trial = f"{name}/lr={lr:g}/seed={seed}"
        return float(bench.train(trial, optimizer, schedule, samples=samples, seed=seed)["loss"])

    tuning = {name: {lr: train(name, lr, 0) for lr in config.learning_rates} for name in schemes}
    rates = best_rates(tuning)
    losses: dict[str, list[float]] = {name: [] for name in schemes}
    for seed in range(1, config.seeds + 1):
        for name in schemes:
            losses[name].append(train(name, rates[name], seed))
    return rates, losses, tuning


def _optimizer(scheme: PrecisionScheme | None, lr: float, model: nn.Module) -> torch.optim.Optimizer:
    if scheme is not None:
        apply_scheme(model, scheme)
    return torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)


def loss_gap(losses: Mapping[str, Sequence[float]], names: Sequence[str]) -> list[float | None]:
    """Return by how many percent the worst of some schemes ends below float32, seed by seed; negative: above.

    >>> loss_gap({"float32": [2.0, 4.0], "a": [2.0, 4.2], "b": [2.02, 4.0]}, ["a", "b"])
    [-1.0, -5.0]
    """
    worst = [max(losses[name][i] for name in names) for i in range(len(losses[FP32]))]
    gaps = [round(100 * (1 - loss / exact), 10) for loss, exact in zip(worst, losses[FP32], strict=True)]
    return [gap if math.isfinite(gap) else None for gap in gaps]


def switch_gain(dual: Mapping[str, Any], fmt: str) -> float | None:
    """Return how many percent of the loss that a format adds a switch to bf16 inputs and gradients takes back.

    None: the format adds nothing, or a run diverged.

    >>> switch_gain({"float32": 1.0, "E2M1": {"none": 1.5, "bf16_act_all": 1.125}}, "E2M1")
    75.0
    """
    exact, left, switched = dual[FP32], dual[fmt]["none"], dual[fmt].get("bf16_act_all")
    if None in (exact, left, switched) or left <= exact:
        return None
    return float(100 * (left - switched) / (left - exact))


def bias_effects(study: BiasStudy, biases: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the effects of the bias study, each one number per seed."""
    sharp, others = f"{study.factors[1]:g}", [f"{factor:g}" for factor in study.factors[1:]]
    trained = [str(step) for step in study.trained]

    def over(bias: Mapping[str, Any], above: str, below: str) -> float:
        """Geometric mean over trained steps of a ratio of two rho."""
        return statistics.geometric_mean([bias["rho"][step][above] / bias["rho"][step][below] for step in trained])

    def removed(bias: Mapping[str, Any]) -> float | None:
        all_mx, rceil = (
            statistics.fmean(bias["rescaled"][factor]["loss"][name] - 1 for factor in others)
            for name in ("all E4M3", "rceil")
        )
        return 100 * (1 - rceil / all_mx) if all_mx > 0 else None

    def moved(bias: Mapping[str, Any]) -> float:
        ratios = [bias["rho"][step]["forward only"] / bias["rho"][step]["all E4M3"] for step in trained]
        return 100 * statistics.fmean(abs(ratio - 1) for ratio in ratios)

    return {
        "shared code": [
            b["rescaled"][sharp]["rho"]["all E4M3"] / b["rescaled"][sharp]["rho"]["norms exempt"] for b in biases
        ],
        "clamp": [removed(bias) for bias in biases],
        "norms": [over(bias, "all E4M3", "norms exempt") for bias in biases],
        "formats": [min(over(b, "all E2M1", "all E3M2"), over(b, "all E3M2", "all E4M3")) for b in biases],
        "forward": [-moved(bias) for bias in biases],
    }


experiment = Experiment(
    name="quant.mx",
    title="Gains that share a code bias the gradient of block-scaled training; better scales and bf16 inputs mend it",
    paper="Characterization and mitigation of training instabilities in microscaling formats, arXiv 2506.20752",
    presets={"smoke": smoke, "cpu": cpu, "gpu": gpu},
    minutes={"smoke": "5 s", "cpu": "4 min", "gpu": "not measured"},
    run=run,
    claims=(
        Claim(
            "shared code",
            "Gains that share a block and a code bias the gradient: moved below 1, 1.5 times as much as exempt norms",
            "cause named, no such test",
            "x rho of exempt norms",
            at_least=1.5,
        ),
        Claim(
            "clamp",
            "Scales that saturate nothing (rceil) remove at least half of the loss that clamped gains add",
            "a raised exponent delays or prevents divergence (figure)",
            "% of the added loss removed",
            at_least=50.0,
        ),
        Claim(
            "norms",
            "While training, the gradient's bias is smaller with norms exempt",
            "cause named, no number",
            "x rho of exempt norms",
            at_least=1.0,
        ),
        Claim(
            "formats",
            "Fewer mantissa bits bias the gradient more: E2M1 more than E3M2 more than E4M3",
            "no number",
            "x rho, the smaller of both ratios",
            at_least=1.0,
        ),
        Claim(
            "forward",
            "The bias enters through the forward values: without quantised backward products it stays within 1%",
            "quantising only the forward pass is stable; the bias itself is not given",
            "% difference of rho, negative",
            at_least=-1.0,
        ),
        Claim(
            "switch",
            "A switch to bf16 inputs and gradients in mid-run takes back at least half of the loss that a format added",
            "switched before the spike, a run does not diverge (figure); no number known to us",
            "% of the added loss",
            at_least=50.0,
        ),
        Claim(
            "gap",
            "8-bit schemes end within 1.5% of float32's loss, where nothing diverges",
            "small or unstable, by size; no number known to us",
            "%, float32 minus the worst",
            at_least=-1.5,
        ),
        Claim(
            "remedy",
            "E4M3 weights with bf16 inputs, and E4M3 forward only, both end within 0.5% of float32's loss",
            "close to full precision; no number known to us",
            "%, float32 minus the worse",
            at_least=-0.5,
        ),
        Claim(
            "spikes",
            "Runs in block-scaled formats spike beyond recovery where float32 does not (not testable below preset gpu)",
            "from 2e17 FLOPs on, more at larger compute; the proxy near step 5100 at width 512",
            " spikes more than float32",
            at_least=1.0,
        ),
    ),
    figures=figures,
    papers=(
        Paper(
            "Characterization and Mitigation of Training Instabilities in Microscaling Formats",
            "2506.20752",
            (
                "Huangyuan Su",
                "Mujin Kwun",
                "Stephanie Gil",
                "Sham Kakade",
                "Nikhil Anand",
            ),
        ),
    ),
)
