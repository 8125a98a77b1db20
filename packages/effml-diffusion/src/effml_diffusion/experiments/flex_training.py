"""What the trainings of `diffusion.flex` share: one shape of network, one loop, batches in the form of an objective.

All networks are told a(t) by adaptive layer norms, those of masked diffusion too, so that they differ in nothing but
the gap head. Batches for FlexMDM come with their times, rows sorted by how many tokens will be present: micro-batches
of neighbours are then short ones and long ones, where a whole batch would be padded to the longest text in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from effml_shared import distributed, seeding
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.loop import Budget, Loop
from effml_shared.runs import Trial
from effml_shared.schedules import Clock, cosine
from effml_shared.steps import GradientStep, Loss
from torch import Tensor

from effml_diffusion.corruption import stratified_times
from effml_diffusion.diffusion_transformer import DiffusionTransformer
from effml_diffusion.diffusion_transformer_config import DiffusionTransformerConfig
from effml_diffusion.flex import FlexMDM
from effml_diffusion.puzzles.sample_stream import SampleStream, Source

__all__ = ["Batches", "Shape", "Training", "make_network", "shortest_first", "stream", "train"]

Batch = dict[str, Tensor]


@dataclass
class Shape:
    """Of a network, whatever its objective."""

    n_layers: int = 3
    d_model: int = 64
    n_heads: int = 4
    cond_dim: int = 32  # channels in which a(t) is told

    def __post_init__(self) -> None:
        for name in ("n_layers", "d_model", "n_heads", "cond_dim"):
            check_count(name, getattr(self, name), 1)


@dataclass
class Training:
    """Of one network; all methods have the same."""

    steps: int = 600
    batch_size: int = 64
    micro_batch: int = 32  # rows per forward pass of a FlexMDM
    lr: float = 6e-3  # peak, of AdamW without weight decay
    warmup: int = 50  # steps
    clip_norm: float = 1.0
    precision: str = "float32"  # or bfloat16 (autocast)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch"):
            check_count(name, getattr(self, name), 1)
        check_count("warmup", self.warmup, 0)
        check_range("lr", self.lr, 0.0)
        if self.warmup >= self.steps:
            raise ConfigError(f"warmup: got {self.warmup} steps, expected fewer than steps={self.steps}")
        if not self.clip_norm > 0:
            raise ConfigError(f"clip_norm: got {self.clip_norm}, expected a number > 0")
        check_choice("precision", self.precision, ("float32", "bfloat16"))

    @property
    def samples(self) -> int:
        return self.steps * self.batch_size


class Batches:
    """A stream's samples in the form that an objective takes; its position is the stream's."""

    def __init__(self, samples: SampleStream, form: Callable[[Batch], Batch]) -> None:
        self.samples, self.form = samples, form

    def next(self, batch_size: int) -> Batch:
        """Return this rank's part of the next batch."""
        return self.form(self.samples.next(batch_size))

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return self.samples.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position."""
        self.samples.load_state_dict(state)


def stream(source: Source, seed: int) -> SampleStream:
    """Return the training samples of a seed: the same for every method, whatever form they are given."""
    seed = seeding.derive_seed(seed, "train")
    return SampleStream(source, seed=seed, rank=distributed.rank(), world_size=distributed.world_size())


def shortest_first(flex: FlexMDM, samples: Batch) -> Batch:
    """Draw the times of a batch for `flex.loss_terms`, and sort its rows by their expected number of present tokens."""
    ids = samples["input_ids"]
    rank, world_size = distributed.rank(), distributed.world_size()
    t = flex.t_max * (1 - stratified_times(len(ids), rank=rank, world_size=world_size, device=ids.device))
    given = samples["fixed"].sum(1)
    order = (given + (samples["lengths"] - given) * flex.interpolant.insert.value(t)).argsort()
    return {name: samples[name][order] for name in ("input_ids", "fixed", "closed")} | {"flow_t": t[order]}


def make_network(shape: Shape, vocab_size: int, seed: int, **head: Any) -> DiffusionTransformer:
    """Return an untrained network on the default device; head: fields of its gap head, if it is to have one."""
    config = DiffusionTransformerConfig(
        n_layers=shape.n_layers,
        d_model=shape.d_model,
        n_heads=shape.n_heads,
        cond_dim=shape.cond_dim,
        conditioning="alpha",
        vocab_size=vocab_size,
        **head,
    )
    return DiffusionTransformer(config, seeding.derive_seed(seed, "model")).to(distributed.default_device())


def train(
    trial: Trial,
    model: DiffusionTransformer,
    loss: Loss,
    data: Batches,
    training: Training,
    seed: int,
    *,
    measure: Callable[[], dict[str, Any]],
    micro_batch: int | None = None,
) -> dict[str, Any]:
    """Train a network and return what is measured of it, in plain JSON; a training that diverged has no measures."""
    optimizer = torch.optim.AdamW(model.parameters(), training.lr, betas=(0.9, 0.98), weight_decay=0.0)
    step = GradientStep(
        distributed.parallelize(model, "ddp"),
        optimizer,
        loss,
        micro_batch=micro_batch,
        clip_norm=training.clip_norm,
        precision=training.precision,
    )
    loop = Loop(
        step,
        data,
        cosine(training.batch_size, training.samples, warmup=training.warmup * training.batch_size),
        budget=Budget(samples=training.samples),
        hooks=trial.hooks,
        checkpoints=trial.checkpoints,
        seed=seed,
    )
    try:
        loop.run()
        measured = measure()
    except NonFiniteError:  # a training that diverged has nothing to show, and its run goes on
        measured = {}
    return {
        "measured": measured,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **_clock(loop.clock),
    }


def _clock(clock: Clock) -> dict[str, Any]:
    return {"steps": max(clock.step, 1), "seconds": clock.seconds, "samples": clock.samples}
