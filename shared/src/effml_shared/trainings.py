"""What the experiments that train language models share: their configuration, data, precision, one resumable training.

A `TrainingBench` trains one model after another on the same data. What differs between trainings is the optimizer, the
schedule and the seed; model, order of the data and random state follow from the seed alone, so methods that share a
seed see the same batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from effml_shared import distributed, seeding
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.data import Batch, DataConfig, Loader, PackedDataset, StreamingLoader, open_data
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.experiments import interval
from effml_shared.loop import Budget, Hook, Loop
from effml_shared.runs import Run, Trial
from effml_shared.schedules import Schedule
from effml_shared.steps import GradientStep, faster_precision, language_model_loss
from effml_shared.transformer import Transformer, TransformerConfig

__all__ = ["TrainingBench", "TrainingConfig", "best_rates", "half_width", "numbers"]


@dataclass
class TrainingConfig:
    """What is trained, on what, for how long, how often and how it is judged."""

    model: TransformerConfig = field(default_factory=TransformerConfig)  # vocab_size: the tokenizer's
    data: DataConfig = field(default_factory=DataConfig)
    batch_size: int = 16  # sequences per step
    micro_batch: int | None = None  # sequences per forward pass; None: all
    steps: int = 150  # the full budget, at batch_size
    warmup: float = 0.1  # fraction of each run's samples
    learning_rates: list[float] = field(default_factory=lambda: [2.5e-3, 5e-3, 1e-2, 2e-2])  # the grid
    seeds: int = 3  # measured, besides the one for tuning
    clip_norm: float = 1.0
    eval_sequences: int = 256  # held out, evaluated at the end of every run
    precision: str = "auto"  # float32, bfloat16 (autocast), or auto: the faster on this machine
    compile: bool = False  # of the model's forward and backward pass

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps", "seeds", "eval_sequences"):
            check_count(name, getattr(self, name), 1)
        if self.micro_batch is not None:
            check_count("micro_batch", self.micro_batch, 1)
        check_range("warmup", self.warmup, 0.0, 1.0)
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ConfigError(f"learning_rates: got {self.learning_rates}, expected one or more numbers > 0")
        if not self.clip_norm > 0:
            raise ConfigError(f"clip_norm: got {self.clip_norm}, expected a number > 0")
        check_choice("precision", self.precision, ("auto", "float32", "bfloat16"))


class TrainingBench:
    """The model, data and precision that all trials of a run share."""

    def __init__(self, config: TrainingConfig, run: Run) -> None:
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

    def model(self, seed: int) -> nn.Module:
        """Return an untrained model; a subclass may train another one that takes the same batches."""
        return Transformer(self.model_config, seed=seeding.derive_seed(seed, "model")).to(self.device)

    @property
    def rows(self) -> int:
        """Sequences per forward pass."""
        return self.config.micro_batch or self.config.batch_size

    def _measure(self) -> str:
        rows = torch.arange(min(self.rows, len(self.held_out)))
        return faster_precision(self.model(0), _loss, self.held_out.batch(rows.numpy()))

    def train(
        self,
        name: str,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        schedule: Schedule,
        *,
        samples: int,
        seed: int,
        hooks: Callable[[nn.Module], Sequence[Hook]] = lambda model: (),
        measure: Callable[[nn.Module, Callable[[], float]], Mapping[str, Any]] = lambda model, evaluate: {},
    ) -> dict[str, Any]:
        """Train once, unless the run has done so already; returns `loss` (held out, at the end), `steps`, `seconds`.

        A training that meets NaN or infinity has an infinite loss: it counts against its learning rate and method.

        Args:
            name: of the trial; up to its first `/` it is the method.
            optimizer: makes one for a model; its learning rates are the peak of the schedule.
            schedule: the plan of each step.
            samples: sequences in all.
            seed: of the model, the order of the data and everything random.
            hooks: makes more of them for the model; they come before the trial's own, so what they put into the metrics
                is recorded.
            measure: called with the trained model and a function that evaluates it; returns more results, plain JSON.
                Not called after a divergence.
        """

        config = self.config

        def body(trial: Trial) -> dict[str, Any]:
            model = distributed.parallelize(self.model(seed), "ddp")
            more: Mapping[str, Any] = {}
            step = GradientStep(
                model,
                optimizer(model),
                _loss,
                micro_batch=config.micro_batch,
                clip_norm=config.clip_norm,
                precision=self.precision,
                compile=config.compile,
            )
            loop = Loop(
                step,
                self._data(seed),
                schedule,
                budget=Budget(samples=samples),
                hooks=[*hooks(model), *trial.hooks],
                evaluate=lambda: step.evaluate(self._held_out_batches()),
                checkpoints=trial.checkpoints,
                seed=seed,
            )
            try:
                clock, loss = loop.run(), loop.evaluation["loss"]
                more = measure(model, lambda: step.evaluate(self._held_out_batches())["loss"])
            except NonFiniteError:
                clock, loss = loop.clock, math.inf
            return {
                "method": trial.name.partition("/")[0],
                "loss": loss,
                "steps": max(clock.step, 1),
                "seconds": clock.seconds,
                "samples": clock.samples,
                **more,
            }

        result = self.run.trial(name, body)
        return {**result, "loss": math.inf if result["loss"] is None else result["loss"]}

    def _held_out_batches(self) -> Iterator[Batch]:
        indices = torch.arange(min(self.config.eval_sequences, len(self.held_out)))
        mine = indices[distributed.rank() :: distributed.world_size()]
        for rows in mine.split(self.rows):
            yield self.held_out.batch(rows.numpy())


def _loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Let attention run across document borders: that needs no mask, and so the fastest kernels serve."""
    return language_model_loss(model, {"input_ids": batch["input_ids"], "labels": batch["labels"]})


def best_rates(tuning: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """Return each method's learning rate of least loss.

    Raises:
        ConfigError: a method diverged at every one.

    >>> best_rates({"AdamW": {0.01: 2.5, 0.02: math.inf}})
    {'AdamW': 0.01}
    """
    best = {method: min(losses, key=lambda lr: losses[lr]) for method, losses in tuning.items()}
    if diverged := [method for method, losses in tuning.items() if not math.isfinite(losses[best[method]])]:
        raise ConfigError(f"learning_rates: {', '.join(diverged)} diverged at every one, expected smaller ones as well")
    return best


def half_width(values: Sequence[float]) -> float | None:
    """Return half of the 95% interval of the mean, or None for a single value or where a training diverged."""
    mean, low, _ = interval(values)
    return mean - low if math.isfinite(low) else None


def numbers(values: Sequence[float | None]) -> list[float]:
    """Return stored numbers with NaN where a training diverged, which leaves a gap in a plot."""
    return [math.nan if value is None else value for value in values]
