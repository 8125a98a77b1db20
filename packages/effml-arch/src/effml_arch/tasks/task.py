"""Synthetic tasks as data: endless sequences with one exact target at every scored position.

A task is a pure function from raw random bits to ids and targets. Sample n of a seed follows from the seed and n alone,
whatever the batch size, the library release or the machine; training and held-out samples have different seeds, and
may coincide where a task has few sequences. Targets are aligned with the ids: the model is to say target t when it has
read ids 0..t. What need not or cannot be known has the target -100. Cost: microseconds per sequence, no state.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from effml_shared.checks import check_count
from effml_shared.errors import CheckpointError
from effml_shared.seeding import derive_seed
from effml_shared.tensors import IGNORE_INDEX
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["IGNORE_INDEX", "Task", "TaskStream", "accuracy"]

Ids = NDArray[np.int64]
Bits = NDArray[np.uint64]


class Task:
    """What a synthetic task is: its sizes, and `encode`. Subclasses are frozen dataclasses."""

    name: ClassVar[str]

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """Ids, in the input or as targets."""
        raise NotImplementedError

    @property
    def draws(self) -> int:
        """Random numbers that a sequence takes."""
        raise NotImplementedError

    def encode(self, bits: Bits) -> tuple[Ids, Ids]:
        """Return ids and targets (rows, length) for uniform random bits (rows, draws), uint64."""
        raise NotImplementedError

    def batch(self, rows: range, seed: int = 0) -> dict[str, Tensor]:
        """Return samples as int64 tensors `input_ids` and `targets`, both (rows, length)."""
        seeds = [derive_seed(seed, self.name, row) for row in rows]
        bits = np.array([np.random.PCG64(s).random_raw(self.draws) for s in seeds], np.uint64)
        ids, targets = self.encode(bits.reshape(len(rows), self.draws))
        return {"input_ids": torch.from_numpy(ids), "targets": torch.from_numpy(targets)}


class TaskStream:
    """Fresh samples of a task for a `Loop`; its position is all its state. Each rank gets a part of every batch."""

    def __init__(self, task: Task, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.task, self.seed, self.rank, self.world_size = task, seed, rank, world_size
        self.position = 0  # samples consumed, all ranks together

    def next(self, batch_size: int) -> dict[str, Tensor]:
        """Return this rank's part of the next `batch_size` samples."""
        check_count("batch_size", batch_size, 1)
        first, last = (self.position + batch_size * r // self.world_size for r in (self.rank, self.rank + 1))
        self.position += batch_size
        return self.task.batch(range(first, last), self.seed)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it counts, as JSON values."""
        return {"position": self.position, "task": repr(self.task), "seed": self.seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; CheckpointError if that was another task or seed."""
        for name, now in (("task", repr(self.task)), ("seed", self.seed)):
            if state.get(name) != now:
                raise CheckpointError(f"{name}: got {now!r}, expected {state.get(name)!r} of the checkpoint")
        self.position = state["position"]


def accuracy(logits: Tensor, targets: Tensor) -> float:
    """Return the share of scored targets (..., length) at which logits (..., length, vocab) are largest.

    NaN if nothing is scored.
    """
    scored = targets != IGNORE_INDEX
    return (logits.argmax(-1) == targets)[scored].double().mean().item()


def below(bits: Bits, count: int) -> Ids:
    """Return uniform integers in [0, count) from random bits, with a bias of less than count / 2^64."""
    return (bits % np.uint64(count)).astype(np.int64)
