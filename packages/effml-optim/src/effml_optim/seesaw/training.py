"""A `SeesawPlan` in loops that are not effml's: a scheduler and a batch sampler for plain PyTorch and accelerate.

Both are thin views of one plan and of one number, the samples consumed: the scheduler holds it, sets learning rates and
says how many micro-batches the next step takes; the sampler says which samples they are. Micro-batches keep one shape
(compiled graphs and memory stay as they are); a larger batch is more of them. On one process:

    plan = SeesawPlan.from_cosine(total, warmup, batch_size, unit=micro_batch)
    print(plan.table())
    scheduler = SeesawScheduler(optimizer, plan, micro_batch=micro_batch)
    sampler = SeesawBatchSampler(plan, dataset, micro_batch=micro_batch)
    for micro_batches in scheduler.iterate(DataLoader(dataset, batch_sampler=sampler)):
        for inputs, targets in micro_batches:
            (loss_sum(model(inputs), targets) / scheduler.batch_size).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()

To resume: `scheduler.load_state_dict(...)`, then `sampler.start = scheduler.samples`. The sampler keeps no position of
its own, because workers of a `DataLoader` fetch ahead of training.

Loss: divide sums by the count of the *whole* global batch, samples or valid tokens of all ranks, so that steps whose
micro-batches differ in size are exact. Several ranks: DDP averages gradients over them, so multiply the loss by their
number; run all micro-batches but the last under `no_sync()` (FSDP2: `set_requires_gradient_sync(False)`).

Accelerate: the same loop with `accelerator.backward` and `accelerator.no_sync(model)`. Prepare model and optimizer;
neither the loader (the sampler knows its rank) nor the scheduler (it counts samples, not processes) need it. Do not use
`accelerator.accumulate`: it takes a step wherever its own count of micro-batches is a multiple of the number it is set
to, which is the wrong place once that number has changed. `accelerator.register_for_checkpointing(scheduler)` works.

Cost: microseconds per step; the order of one epoch, 8 bytes per sample of the dataset. Source: derived here; the paper
(arXiv 2510.14717) leaves betas and weight decay alone, which is the default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from effml_shared.checks import check_count
from effml_shared.data.loader import Loader
from effml_shared.errors import CheckpointError, ConfigError, DataError
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Sampler

from effml_optim.seesaw.plan import SeesawPlan

__all__ = ["SeesawBatchSampler", "SeesawScheduler", "split"]

T = TypeVar("T")


def split(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """Cut into `count` contiguous parts whose lengths differ by one at most.

    >>> split(range(7), 3)
    [range(0, 2), range(2, 4), range(4, 7)]
    """
    return [items[len(items) * i // count : len(items) * (i + 1) // count] for i in range(count)]


class SeesawScheduler:
    """Set an optimizer's learning rates by a plan and say how much data the next step takes.

    Every param group keeps its own peak: its `initial_lr`, which is its learning rate at construction, is multiplied by
    the plan's factor. Learning rates that are tensors are filled in place.

    Args:
        optimizer: any torch optimizer; its learning rates are set for the first step at once.
        plan: its batches, but for a short last one, are multiples of `micro_batch * world_size`.
        micro_batch: samples per forward pass and rank.
        world_size: number of data-parallel ranks.
        rescale_betas: raise `betas` to the power B / B0, so that moments forget per sample what they did at B0.
        scale_weight_decay: keep the base schedule's decoupled decay per sample, lr * weight_decay / B: for
            `rule="adam"`, `weight_decay` grows as sqrt(B / B0).

    Attributes:
        samples: samples consumed, over all ranks.
        steps: optimizer steps taken.

    Raises:
        ConfigError: the plan's batches do not fit, or there are no betas to rescale.
    """

    # No subclass of `torch.optim.lr_scheduler.LRScheduler`: accelerate would step one of those once per process.

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        plan: SeesawPlan,
        *,
        micro_batch: int,
        world_size: int = 1,
        rescale_betas: bool = False,
        scale_weight_decay: bool = False,
    ) -> None:
        check_count("micro_batch", micro_batch, 1)
        check_count("world_size", world_size, 1)
        chunk = micro_batch * world_size
        for row in plan.rows:
            short = row.first_sample + row.batch_size == plan.total
            if row.batch_size % chunk and not short:
                got = f"a batch of {row.batch_size} at sample {row.first_sample}"
                use = f"plan with unit={chunk}, or plan.replan({chunk})"
                raise ConfigError(f"plan: got {got}, expected multiples of micro_batch * world_size = {chunk}: {use}")
        if rescale_betas and not any("betas" in group for group in optimizer.param_groups):
            raise ConfigError("rescale_betas: got an optimizer without betas")
        self.optimizer, self.plan, self.micro_batch, self.world_size = optimizer, plan, micro_batch, world_size
        self.rescale_betas, self.scale_weight_decay = rescale_betas, scale_weight_decay
        self.samples = self.steps = 0
        self._apply()

    @property
    def finished(self) -> bool:
        """Whether the plan's samples are consumed."""
        return self.samples >= self.plan.total

    @property
    def batch_size(self) -> int:
        """Samples of the next step, over all ranks; 0 once finished."""
        return 0 if self.finished else self.plan.at(self.samples).batch_size

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of the next step on each rank; 0 once finished."""
        return _micro_steps(self.batch_size, self.micro_batch, self.world_size)

    def get_last_lr(self) -> list[float]:
        """Return the learning rate of each param group for the next step."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def step(self, samples: int | None = None) -> None:
        """Count the batch just used, of `samples` if it was not the planned one, and set what the next step needs.

        Raises:
            ConfigError: `samples` is no count, or the plan is finished.
        """
        if self.finished:
            raise ConfigError(f"step: got one after the last of {self.plan.total} samples, expected the loop to end")
        if samples is not None:
            check_count("samples", samples, 1)
        self.samples += self.batch_size if samples is None else samples
        self.steps += 1
        self._apply()

    def iterate(self, micro_batches: Iterable[T]) -> Iterator[list[T]]:
        """Yield, until the plan is finished, the micro-batches of one step; call `step()` before asking for the next.

        Raises:
            ConfigError: `step()` was not called.
            DataError: `micro_batches` ended early.
        """
        stream = iter(micro_batches)
        while not self.finished:
            begun = self.samples
            group = list(islice(stream, self.accumulation_steps))
            if len(group) < self.accumulation_steps:
                raise DataError(f"micro-batches: got an end at sample {begun}, expected {self.plan.total} samples")
            yield group
            if self.samples == begun:
                raise ConfigError("iterate: got no call of scheduler.step() since the last step, expected one")

    def state_dict(self) -> dict[str, Any]:
        """Return samples, steps and the plan's fingerprint, as JSON values."""
        return {"samples": self.samples, "steps": self.steps, "plan": self.plan.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; load the optimizer's state first.

        Raises:
            CheckpointError: that was with another plan (one of another unit, from `replan`, is none).
        """
        if state["plan"] != self.plan.fingerprint:
            got = f"got {self.plan.fingerprint}, expected {state['plan']} of the checkpoint"
            raise CheckpointError(f"plan: {got}: resume with the same plan, or start a new run")
        self.samples, self.steps = state["samples"], state["steps"]
        self._apply()

    def _apply(self) -> None:
        """Set every group from its initial values, which are kept in the group: nothing compounds."""
        if self.finished:
            return
        plan = self.plan.at(self.samples)
        growth = plan.batch_size / self.plan.batch_size
        for group in self.optimizer.param_groups:
            lr = float(group.setdefault("initial_lr", float(group["lr"]))) * plan.lr_factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
            if self.rescale_betas and "betas" in group:
                group["betas"] = tuple(beta**growth for beta in group.setdefault("initial_betas", group["betas"]))
            if self.scale_weight_decay:
                initial = group.setdefault("initial_weight_decay", group["weight_decay"])
                group["weight_decay"] = initial * growth / self.plan.lr_boost(plan.batch_size)


class SeesawBatchSampler(Sampler[list[int]]):
    """Yield this rank's micro-batches of a plan as lists of indices, for `DataLoader(batch_sampler=...)`.

    Sample n of the run depends on n, `seed` and the dataset's length alone: not on batches, ranks or micro-batches. It
    is the sample that `effml_shared.data.Loader` takes: epochs follow each other, each in its own order. A rank gets a
    contiguous slice of each global batch, cut into equally many micro-batches on every rank.

    Args:
        plan: which batch at which sample.
        dataset: a dataset of known length, or that length.
        micro_batch: largest micro-batch, in samples; None: a rank's whole share of a step is one.
        rank, world_size: which of how many data-parallel ranks this is.
        seed: of the order.
        shuffle: False takes samples in the dataset's order, epoch after epoch.
        start: sample to begin at; set the attribute of that name to resume.

    Raises:
        ConfigError: an argument is out of range, or a step has too few samples for every rank and micro-batch.

    >>> plan = SeesawPlan.from_cosine(48, 0, 4, alpha=2.0, unit=4)
    >>> list(SeesawBatchSampler(plan, 100, micro_batch=4, shuffle=False))[5:8]
    [[20, 21, 22, 23], [24, 25, 26, 27], [28, 29, 30, 31]]
    """

    def __init__(
        self,
        plan: SeesawPlan,
        dataset: Sized | int,
        *,
        micro_batch: int | None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        start: int = 0,
    ) -> None:
        if not isinstance(dataset, (int, Sized)):
            raise ConfigError(f"dataset: got {type(dataset).__name__} without a length, expected a map-style dataset")
        length = dataset if isinstance(dataset, int) else len(dataset)
        check_count("dataset", length, 1)
        check_count("world_size", world_size, 1)
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank: got {rank}, expected an integer in [0, {world_size})")
        check_count("start", start, 0)
        if micro_batch is not None:
            check_count("micro_batch", micro_batch, 1)
        self.plan, self.micro_batch, self.start = plan, micro_batch, start
        self._samples = Loader(_Places(length), seed=seed, rank=rank, world_size=world_size, shuffle=shuffle)
        for row in plan.rows_from(start):
            if row.batch_size // world_size < (micro_steps := self._micro_steps(row.batch_size)):
                got = f"a step of {row.batch_size} samples for {world_size} ranks with {micro_steps} micro-batches each"
                use = "plan with unit = micro_batch * world_size and a total that is a multiple of it"
                raise ConfigError(f"plan: got {got}, expected a sample for each: {use}")

    def __iter__(self) -> Iterator[list[int]]:
        n = self.start
        while n < self.plan.total:
            batch_size = self.plan.at(n).batch_size
            self._samples.position = n
            places = self._samples.next(batch_size)["places"].tolist()
            yield from map(list, split(places, self._micro_steps(batch_size)))
            n += batch_size

    def __len__(self) -> int:
        return sum(row.steps * self._micro_steps(row.batch_size) for row in self.plan.rows_from(self.start))

    def _micro_steps(self, batch_size: int) -> int:
        return 1 if self.micro_batch is None else _micro_steps(batch_size, self.micro_batch, self._samples.world_size)


class _Places:
    """A dataset of numbers: a batch of it is where its samples stand."""

    def __init__(self, length: int) -> None:
        self._length = length
        self.fingerprint: dict[str, Any] = {}

    def __len__(self) -> int:
        return self._length

    def batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        return {"places": torch.from_numpy(indices)}


def _micro_steps(batch_size: int, micro_batch: int, world_size: int) -> int:
    return -(-batch_size // (micro_batch * world_size))
