"""`quant.lotion`: training towards weights that bear rounding to 4 bits, against casting at the end and fake casts.

Three problems, from exact to real, each method with the best learning rate of one grid:

1. Quadratic with a power-law spectrum, one scale for all weights, exact curvature, 10 seeds: full-batch Adam, cosine
   to 0. The best rate is taken seed by seed, each seed being a problem of its own.
2. Two linear layers of growing width, likewise.
3. A language model on real text: AdamW without weight decay, warm-up and cosine to 10%, rates tuned at a seed that
   no claim uses. LOTION's curvature is the empirical Fisher diagonal over all tokens of the batch. All methods clip
   alike: LOTION before its penalty. Held-out loss is judged at the weights each method deploys, rounded to nearest.
   GPTQ is applied on top of what PTQ and LOTION trained.

Source: arXiv 2510.08757. Its numbers at 150M and 300M parameters are known to us at second hand only; its spectra,
widths, rates, tokens and granularity are not, so the sizes here are our own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from effml_shared.citations import Paper
from effml_shared.data import DataConfig
from effml_shared.experiments import Claim, Experiment
from effml_shared.runs import Run
from effml_shared.trainings import best_rates, half_width
from effml_shared.transformer import TransformerConfig

from effml_quant.experiments.least_squares import Problem, Quadratic, RowMethod, TwoLayers, train_rows
from effml_quant.experiments.lotion_figures import figures
from effml_quant.experiments.lotion_text import CLAIMED, LotionExperimentConfig, Setting, Text
from effml_quant.qat import RAT, STE

__all__ = ["experiment"]

RATES, LAYER_RATES = (0.01, 0.03, 0.1), (0.003, 0.01, 0.03, 0.1)  # without data
POWER, LINEAR_DIM = 1.1, 64  # of the spectra; inputs of the two layers


def smoke() -> LotionExperimentConfig:
    """Return a configuration that shows in seconds that everything runs; its numbers mean nothing."""
    return LotionExperimentConfig(
        model=TransformerConfig(d_model=32),
        data=DataConfig(seq_len=16, max_bytes=2_000_000),
        batch_size=4,
        steps=4,
        learning_rates=[1e-2],
        seeds=2,
        eval_sequences=8,
        precision="float32",
        calibration=4,
        quadratic_dim=20,
        quadratic_steps=6,
        quadratic_seeds=2,
        widths=[1, 2],
        width_steps=4,
    )


def cpu() -> LotionExperimentConfig:
    """Return the default: an MLP of 0.23 million parameters on the standard library's sources."""
    return LotionExperimentConfig(
        model=TransformerConfig(d_model=256),
        data=DataConfig(seq_len=64),
        batch_size=4,
        steps=1000,
        learning_rates=[4e-3, 8e-3, 1.6e-2],
        precision="float32",  # autocast would add a rounding that none of the methods is about
    )


def gpu() -> LotionExperimentConfig:
    """Return 30 million parameters, 65 thousand tokens per step; only what the claims need keeps it in time."""
    return LotionExperimentConfig(
        window=0,
        model=TransformerConfig(n_layers=10, d_model=512, n_heads=8),
        data=DataConfig(seq_len=1024),
        batch_size=64,
        micro_batch=32,
        steps=450,
        learning_rates=[2e-3, 4e-3],
        scales=["tensor"],
        methods=list(CLAIMED),
        eval_sequences=512,
        calibration=0,
        compile=True,
    )


def _least_squares(config: LotionExperimentConfig, run: Run) -> dict[str, dict[str, dict[str, Any]]]:
    """Train the problems without data; returns problem -> method -> results, losses at each seed's best rate."""
    quantizer, seeds = config.quantizer("channel"), config.quadratic_seeds  # a row is a tensor of its own
    methods = {
        "PTQ": RowMethod(),
        "QAT": RowMethod(STE(quantizer)),
        "LOTION": RowMethod(strength=1.0),
        "RAT": RowMethod(RAT(quantizer)),
        "LOTION, strength 0.3": RowMethod(strength=0.3),
        "LOTION, scale detached": RowMethod(strength=1.0, through_scale=False),
    }

    def train(
        problem: str, method: str, make: Callable[[], Problem], rates: Sequence[float], steps: int
    ) -> dict[str, Any]:
        found = train_rows(
            run,
            f"{problem}/{method}",
            make,
            methods[method],
            quantizer,
            learning_rates=rates,
            steps=steps,
            draws=config.draws,
        )
        best = [min(range(len(rates)), key=lambda i: found["rtn"][i][seed]) for seed in range(seeds)]
        return {key: [found[key][i][seed] for seed, i in enumerate(best)] for key in ("rtn", "rr", "full")}

    quadratic = partial(Quadratic, seeds, config.quadratic_dim, POWER)
    results = {"quadratic": {m: train("quadratic", m, quadratic, RATES, config.quadratic_steps) for m in methods}}
    for width in config.widths:
        problem, layers = f"two layers, width {width}", partial(TwoLayers, seeds, LINEAR_DIM, POWER, width)
        results[problem] = {m: train(problem, m, layers, LAYER_RATES, config.width_steps) for m in CLAIMED}
    return results


def run(config: LotionExperimentConfig, run: Run) -> dict[str, Any]:
    """Train everything and return effects per seed, a table, and what the figures need."""
    text = Text(config, run)
    first = config.scales[0]
    pairs = [(m, s) for s in config.scales for m in config.methods if s == first or m in CLAIMED]
    trained = [(m, s) for m, s in pairs if m != "PTQ" or s == first]
    rates, seeds = config.learning_rates, range(1, config.seeds + 1)
    rows_steps = 6 * config.quadratic_steps + 3 * len(config.widths) * config.width_steps
    on_text = len(trained) * (len(rates) + config.seeds)
    run.expect(on_text * config.steps * config.batch_size + rows_steps)

    linear = _least_squares(config, run)

    def train(method: str, scale: str, lr: float, seed: int) -> dict[str, Any]:
        return text.train(Setting(method, first if method == "PTQ" else scale, lr, seed))

    def loss(result: dict[str, Any], scale: str) -> float:
        return result["rtn"][scale] if "rtn" in result else math.inf

    tuning = {(m, s): {lr: loss(train(m, s, lr, 0), s) for lr in rates} for m, s in pairs}
    best = dict(
        zip(pairs, best_rates({f"{m} per {s}": losses for (m, s), losses in tuning.items()}).values(), strict=True)
    )
    finals: dict[tuple[str, str], list[dict[str, Any]]] = {pair: [] for pair in pairs}
    for seed in seeds:
        for method, scale in pairs:
            finals[method, scale].append(train(method, scale, best[method, scale], seed))
    losses = {pair: [loss(result, pair[1]) for result in results] for pair, results in finals.items()}

    def below(scale: str, method: str) -> list[float]:
        return [theirs - ours for theirs, ours in zip(losses[method, scale], losses["LOTION", scale], strict=True)]

    quadratic = linear["quadratic"]
    narrow, wide = (_gain(linear[f"two layers, width {width}"]) for width in (config.widths[0], config.widths[-1]))
    return {
        "effects": {
            "quadratic_qat": _percent_below(quadratic, "QAT"),
            "quadratic_ptq": _percent_below(quadratic, "PTQ"),
            "width": [before - after for before, after in zip(narrow, wide, strict=True)],
            "text_qat": below("tensor", "QAT"),
            "text_ptq": below("tensor", "PTQ"),
            "channel_qat": below("channel", "QAT") if "channel" in config.scales else [],
        },
        "table": [*_linear_table(linear), *_text_table(config, best, finals, losses)],
        "linear": linear,
        "tuning": {f"{m} per {s}": [[lr, value] for lr, value in losses.items()] for (m, s), losses in tuning.items()},
        "finals": {f"{m} per {s}": values for (m, s), values in losses.items()},
        "full": {f"{m} per {s}": [r.get("full") for r in results] for (m, s), results in finals.items()},
        "gptq": {f"{m} per {s}": v for (m, s), results in finals.items() if (v := _column(results, "gptq", s))},
        "distance": {f"{m} per {s}": results[0].get("distance", {}).get(s) for (m, s), results in finals.items()},
    }


def _column(results: Sequence[dict[str, Any]], key: str, scale: str) -> list[float]:
    """Return one kind of loss of all seeds, or nothing where it was not measured."""
    return [r[key][scale] for r in results] if all(scale in r.get(key, {}) for r in results) else []


def _gain(methods: dict[str, dict[str, Any]]) -> list[float]:
    return [qat - ours for qat, ours in zip(methods["QAT"]["rtn"], methods["LOTION"]["rtn"], strict=True)]


def _percent_below(methods: dict[str, dict[str, Any]], base: str) -> list[float]:
    return [
        100 * (1 - ours / other) for ours, other in zip(methods["LOTION"]["rtn"], methods[base]["rtn"], strict=True)
    ]


def _row(
    problem: str, method: str, rate: str, rtn: Sequence[float], base: Sequence[float], **more: Any
) -> dict[str, Any]:
    gaps = [theirs - ours for theirs, ours in zip(base, rtn, strict=True)]
    return {
        "problem": problem,
        "method": method,
        "learning rate": rate,
        "loss, cast": statistics.fmean(rtn),
        "± 95%": half_width(rtn),
        "below QAT": None if method == "QAT" else statistics.fmean(gaps),
        "± 95% paired": None if method == "QAT" else half_width(gaps),
        **{name: statistics.fmean(values) if values else None for name, values in more.items()},
    }


def _linear_table(linear: dict[str, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [
        _row(
            problem,
            method,
            "best per seed",
            found["rtn"],
            methods["QAT"]["rtn"],
            **{"loss, randomised": found["rr"], "loss, full precision": found["full"], "loss, GPTQ": []},
        )
        for problem, methods in linear.items()
        for method, found in methods.items()
    ]


def _text_table(
    config: LotionExperimentConfig,
    best: dict[tuple[str, str], float],
    finals: dict[tuple[str, str], list[dict[str, Any]]],
    losses: dict[tuple[str, str], list[float]],
) -> list[dict[str, Any]]:
    ends = (min(config.learning_rates), max(config.learning_rates))
    return [
        _row(
            f"text, {config.format} per {scale}",
            method,
            f"{best[method, scale]:g}" + (" (end of grid)" if best[method, scale] in ends else ""),
            losses[method, scale],
            losses["QAT", scale],
            **{
                "loss, randomised": _column(results, "rr", scale),
                "loss, full precision": [r["full"] for r in results if "full" in r],
                "loss, GPTQ": _column(results, "gptq", scale),
            },
        )
        for (method, scale), results in finals.items()
    ]


experiment = Experiment(
    name="quant.lotion",
    title="LOTION trains weights that lose less when rounded to 4 bits than quantisation-aware training",
    paper="Kwun et al., LOTION, arXiv 2510.08757",
    presets={"smoke": smoke, "cpu": cpu, "gpu": gpu},
    minutes={"smoke": "5 s", "cpu": "5 min", "gpu": "not measured"},
    run=run,
    claims=(
        Claim(
            "quadratic_qat",
            "On a quadratic LOTION's quantised loss is at least 20% below that of straight-through training",
            "below QAT and RAT, figure only; the size is our own",
            "% below QAT",
            at_least=20.0,
        ),
        Claim(
            "quadratic_ptq",
            "On a quadratic LOTION's quantised loss is below that of casting at the end",
            "below PTQ, figure only",
            "% below PTQ",
            at_least=0.0,
        ),
        Claim(
            "width",
            "In two linear layers the gain over straight-through training shrinks as they get wider",
            "figure only",
            " of loss, gain of the narrowest minus gain of the widest",
            at_least=0.0,
        ),
        Claim(
            "text_qat",
            "A language model with one scale per matrix ends 0.02 nats below straight-through training",
            "0.020 nats at 150M (3.295, QAT 3.315), 0.046 at 300M (3.177, QAT 3.223), INT4 on C4",
            " nats below QAT",
            at_least=0.02,
        ),
        Claim(
            "text_ptq",
            "A language model with one scale per matrix ends below casting at the end",
            "0.57 nats at 150M (PTQ 3.864)",
            " nats below PTQ",
            at_least=0.0,
        ),
        Claim(
            "channel_qat",
            "With one scale per output channel a language model still ends below straight-through training",
            "granularity of its runs not known to us",
            " nats below QAT",
            at_least=0.0,
        ),
    ),
    figures=figures,
    papers=(
        Paper(
            "LOTION: Smoothing the Optimization Landscape for Quantized Training",
            "2510.08757",
            (
                "Mujin Kwun",
                "Depen Morwani",
                "Chloe Huangyuan Su",
                "Stephanie Gil",
                "Nikhil Anand",
                "Sham Kakade",
            ),
        ),
    ),
)
