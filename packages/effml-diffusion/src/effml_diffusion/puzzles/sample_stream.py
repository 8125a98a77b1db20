"""Endless samples for a training loop, whose position is one number.

A source turns independent random numbers into samples. Sample n of a seed follows from the seed and n alone, whatever
the batch sizes, the number of ranks or the machine: its numbers are those of SplitMix64 from n times their count on,
which is reached at once. A few operations per number.

Source: SplitMix64, Steele, Lea and Flood (OOPSLA 2014).
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from effml_shared.checks import check_count
from effml_shared.errors import CheckpointError, ConfigError
from effml_shared.seeding import derive_seed
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["SampleStream", "Source", "splitmix"]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15


class Source(Protocol):
    """What a stream asks of its samples."""

    @property
    def fingerprint(self) -> str:
        """What the samples are; a run resumes only with the same."""
        ...

    @property
    def draws(self) -> int:
        """Random numbers per sample."""
        ...

    def batch(self, numbers: Tensor) -> dict[str, Tensor]:
        """Make samples from (rows, draws) int64, each uniform over 0 .. 2^63 - 1."""
        ...


class SampleStream:
    """Fresh samples of a source for the training loop; its position is all its state.

    Each rank gets a contiguous part of every batch, possibly empty.
    """

    def __init__(self, source: Source, *, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank: got {rank}, expected one of [0, {world_size})")
        self.source, self.seed, self.rank, self.world_size = source, seed, rank, world_size
        self.position = 0  # samples consumed, all ranks together

    def next(self, batch_size: int) -> dict[str, Tensor]:
        """Return this rank's part of the next `batch_size` samples."""
        check_count("batch_size", batch_size, 1)
        first, last = (self.position + batch_size * r // self.world_size for r in (self.rank, self.rank + 1))
        self.position += batch_size
        draws = self.source.draws
        numbers = splitmix(derive_seed(self.seed, "samples"), range(first * draws, last * draws))
        return self.source.batch(torch.from_numpy(numbers >> np.uint64(1)).view(torch.int64).view(-1, draws))

    def state_dict(self) -> dict[str, Any]:
        """Return the position and what it counts, as JSON values."""
        return {"position": self.position, "seed": self.seed, "source": self.source.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken; CheckpointError if that was another source or seed."""
        for name, now in (("seed", self.seed), ("source", self.source.fingerprint)):
            if state.get(name) != now:
                raise CheckpointError(f"{name}: got {now!r}, expected {state.get(name)!r} of the checkpoint")
        self.position = state["position"]


def splitmix(seed: int | NDArray[np.uint64], places: range) -> NDArray[np.uint64]:
    """Return the outputs of SplitMix64 at some places of its sequence, (places,), or (seeds, places) for many seeds."""
    start = np.asarray(seed if isinstance(seed, np.ndarray) else seed & _MASK, np.uint64)
    first = np.uint64((places.start + 1) * _GAMMA & _MASK)
    state = start[..., None] + first + np.arange(len(places), dtype=np.uint64) * np.uint64(_GAMMA)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return state ^ (state >> np.uint64(31))
