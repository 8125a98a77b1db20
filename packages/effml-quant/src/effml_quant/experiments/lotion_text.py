"""Trainings on text for `quant.lotion`: one model per method, scale, learning rate and seed, and its loss when cast.

At a budget of seconds a Transformer learns too little to suffer from 4 bits. There the model is an MLP over a window of
bytes, which the same data, loop and evaluation serve: embeddings of the window side by side, a hidden layer, a residual
one, logits; its three matrices are quantised. With `window=0` it is the Transformer, whose head stays as it is.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from effml_shared import seeding
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError
from effml_shared.loop import Hook
from effml_shared.runs import Run
from effml_shared.schedules import cosine
from effml_shared.tensors import cross_entropy_sum
from effml_shared.trainings import TrainingBench, TrainingConfig
from effml_shared.transformer import TransformerConfig, TransformerOutput, initialize
from torch import Tensor, nn

from effml_quant.formats import find_format
from effml_quant.lotion.method import Lotion, LotionConfig
from effml_quant.lotion.variance import neighbours
from effml_quant.qat import LSQ, RAT, STE, Attached, WeightMethod, attach, cast_weights, gptq, placed_weights
from effml_quant.quantizer import Quantizer
from effml_quant.selection import select_weights

__all__ = ["CLAIMED", "METHODS", "LotionExperimentConfig", "Setting", "Text", "WindowMLP"]

METHODS = ("PTQ", "QAT", "RAT", "LSQ", "LOTION")
CLAIMED = ("PTQ", "QAT", "LOTION")
BINS = 25  # of the histograms
EMBEDDING = 24  # channels per byte of the window


@dataclass
class LotionExperimentConfig(TrainingConfig):
    """What is trained and quantised, and how long."""

    window: int = 16  # bytes that an MLP of hidden width model.d_model sees; 0: the Transformer
    format: str = "int4"  # of the weights
    scales: list[str] = field(
        default_factory=lambda: ["tensor", "channel"]
    )  # what shares one; all methods at the first
    methods: list[str] = field(default_factory=lambda: list(METHODS))  # on text
    strength: float = 1.0  # of LOTION's penalty on text
    step_rate: float = 0.02  # learning rate of LSQ's steps, in that of the weights
    calibration: int = 64  # sequences for GPTQ; 0: no GPTQ
    draws: int = 4  # of randomised rounding per evaluation
    quadratic_dim: int = 300
    quadratic_steps: int = 1500
    quadratic_seeds: int = 10  # of the two layers too
    widths: list[int] = field(default_factory=lambda: [2, 8, 32])  # of the two layers, growing
    width_steps: int = 400

    def __post_init__(self) -> None:
        super().__post_init__()
        find_format(self.format)
        for name in ("draws", "quadratic_dim", "quadratic_steps", "quadratic_seeds", "width_steps"):
            check_count(name, getattr(self, name), 1)
        for name in ("calibration", "window"):
            check_count(name, getattr(self, name), 0)
        check_range("strength", self.strength, 0.0)
        check_range("step_rate", self.step_rate, 0.0)
        for method in self.methods:
            check_choice("methods", method, METHODS)
        if missing := set(CLAIMED) - set(self.methods):
            raise ConfigError(f"methods: got {self.methods}, expected {min(missing)} among them, a claim's")
        for scale in self.scales:
            check_choice("scales", scale, ("tensor", "channel"))
        if "tensor" not in self.scales:
            raise ConfigError(f"scales: got {self.scales}, expected 'tensor' among them, the claims'")
        if len(self.widths) < 2 or sorted(self.widths) != self.widths or self.widths[0] < 1:
            raise ConfigError(f"widths: got {self.widths}, expected two or more, growing")

    def quantizer(self, scale: str) -> Quantizer:
        """Return what casts weights, under real-valued scales."""
        return LotionConfig(self.format, scale).quantizer


@dataclass(frozen=True)
class Setting:
    """One training on text; PTQ trains alike for every scale."""

    method: str
    scale: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        scale = [] if self.method == "PTQ" else [f"scale={self.scale}"]
        return "/".join([self.method, *scale, f"lr={self.lr:g}", f"seed={self.seed}"])


class WindowMLP(nn.Module):
    """Predict each byte from the window before it; called like a `Transformer` that is given labels."""

    def __init__(self, config: TransformerConfig, window: int, seed: int) -> None:
        super().__init__()
        self.window, width = window, config.d_model
        self.embed = nn.Embedding(config.rows, EMBEDDING)
        self.first = nn.Linear(window * EMBEDDING, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, config.rows)
        initialize(self, config, seed)

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, doc_ids: Tensor | None = None
    ) -> TransformerOutput:
        """Return summed loss and count of input_ids (batch, seq); labels, if given, are the same bytes."""
        labels = input_ids if labels is None else labels
        embedded = F.pad(self.embed(input_ids[:, :-1]), (0, 0, self.window - 1, 0))
        x = F.gelu(self.first(embedded.unfold(1, self.window, 1).flatten(2)))
        x = x + F.gelu(self.second(x))
        return TransformerOutput(None, *cross_entropy_sum(self.last(x), labels[:, 1:]))


class _Bench(TrainingBench):
    def model(self, seed: int) -> nn.Module:
        if not self.config.window:  # type: ignore[attr-defined]
            return super().model(seed)
        model = WindowMLP(self.model_config, self.config.window, seeding.derive_seed(seed, "model"))  # type: ignore[attr-defined]
        return model.to(self.device)


class Text:
    """Trainings on text and what they leave behind."""

    def __init__(self, config: LotionExperimentConfig, run: Run) -> None:
        self.config = config
        self.bench = _Bench(replace(config, clip_norm=math.inf), run)  # clipping is left to the optimizer's hooks
        self.calibration: list[Tensor] = []  # for GPTQ, one batch that is the same in every session of a run
        if config.calibration:
            self.calibration.append(self.bench.data.next(config.calibration)["input_ids"].to(self.bench.device))

    def train(self, setting: Setting) -> dict[str, Any]:
        """Return a training's results: `full` and, by scale, `rtn`, `rr`, `gptq` losses in nats; the histogram."""
        config, made = self.config, _Made()
        samples = config.steps * config.batch_size
        schedule = cosine(config.batch_size, samples, warmup=int(config.warmup * samples), floor=0.1)
        return self.bench.train(
            setting.name,
            lambda model: self._optimizer(setting, model, made),
            schedule,
            samples=samples,
            seed=setting.seed,
            hooks=lambda model: made.hooks,
            measure=lambda model, evaluate: self._measure(setting, model, evaluate, made),
        )

    def _optimizer(self, setting: Setting, model: nn.Module, made: _Made) -> torch.optim.Optimizer:
        config, quantizer = self.config, self.config.quantizer(setting.scale)
        methods: dict[str, WeightMethod] = {"QAT": STE(quantizer), "RAT": RAT(quantizer), "LSQ": LSQ(quantizer)}
        if setting.method in methods:
            made.attached = attach(model, methods[setting.method])
        learned = [] if made.attached is None else list(made.attached.learned_parameters())
        weights = [p for p in model.parameters() if not any(p is step for step in learned)]
        groups: list[dict[str, Any]] = [{"params": weights}]
        if learned:
            groups.append({"params": learned, "lr": setting.lr * config.step_rate})
        optimizer = torch.optim.AdamW(groups, lr=setting.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        if setting.method == "LOTION":
            lotion = Lotion(model, LotionConfig(config.format, setting.scale, strength=config.strength))
            tokens = config.batch_size * (config.data.seq_len - 1)
            lotion.attach(optimizer, n_terms=tokens, clip_norm=config.clip_norm)
            made.hooks.append(lotion)
        else:

            def clip(*_: Any) -> None:
                torch.nn.utils.clip_grad_norm_(weights, config.clip_norm)

            optimizer.register_step_pre_hook(clip)
        return optimizer

    def _measure(
        self, setting: Setting, model: nn.Module, evaluate: Callable[[], float], made: _Made
    ) -> dict[str, Any]:
        config, casts_at_end = self.config, setting.method in ("PTQ", "LOTION")
        scales = config.scales if setting.method == "PTQ" else [setting.scale]
        deployed = {scale: {} if made.attached is None else made.attached.deployed() for scale in scales}
        if made.attached is not None:
            made.attached.restore()

        def at(weights: dict[str, torch.Tensor]) -> float:
            with placed_weights(model, weights):
                return evaluate()

        found: dict[str, Any] = {"full": evaluate(), "rtn": {}, "rr": {}, "gptq": {}, "distance": {}}
        for scale in scales:
            quantizer = config.quantizer(scale)
            found["rtn"][scale] = at(deployed[scale] or cast_weights(model, quantizer))
            found["distance"][scale] = _distances(model, quantizer)
            if casts_at_end:
                draws = [at(cast_weights(model, quantizer, "rr")) for _ in range(config.draws)]
                found["rr"][scale] = statistics.fmean(draws)
            if casts_at_end and self.calibration and setting.seed:
                found["gptq"][scale] = at(gptq(model, quantizer, self.calibration))
        return found


class _Made:
    """What goes with one model: a method at work in it, and hooks of its loop."""

    def __init__(self) -> None:
        self.attached: Attached | None = None
        self.hooks: list[Hook] = []


def _distances(model: nn.Module, quantizer: Quantizer) -> list[float]:
    """Return the shares of weights by distance to the grid, in equal bins from a grid point to the middle of a cell."""
    total = torch.zeros(BINS, dtype=torch.float64)
    for weight in select_weights(model).values():
        low, high = (end.cpu() for end in neighbours(weight.detach(), quantizer))
        w = weight.detach().cpu()
        offset = (torch.minimum(w - low, high - w) / (high - low)).nan_to_num(0.0)  # 0 / 0: a block of zeros
        total += torch.histc(offset.float(), BINS, 0.0, 0.5)
    return (total / total.sum()).tolist()
