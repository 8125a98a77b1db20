"""Uniform numbers for a batch: one per position, in float64, from one generator or from one per row.

A sampler here needs one number per decision, never one per vocabulary entry: tokens are drawn by inverting their
cumulative distribution (`effml_shared.generation.draw`). In float64 the numbers are multiples of 2^-53; float32 Gumbel
noise stops at 16.6, so that rare tokens never come up, which acts like a lower temperature (arXiv 2409.02908). With
seeds, row b is decided by numbers of its own, whatever the rest of the batch. Cost: 8 bytes per position and call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from effml_shared.errors import ConfigError
from torch import Tensor

__all__ = ["Noise"]


class Noise:
    """Draw (batch, seq) uniform numbers on a device from `generator` (None: the global one) or from one seed per row.

    Numbers are made where the generator lives (seeds: on the CPU) and moved.

    Raises:
        ConfigError: seeds do not match the rows, or come together with a generator.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
    ) -> None:
        if seeds is not None and generator is not None:
            raise ConfigError("seeds: got a generator too, expected one or the other")
        if seeds is not None and len(seeds) != shape[0]:
            raise ConfigError(f"seeds: got {len(seeds)} of them, expected one for each of {shape[0]} rows")
        self.shape, self.device, self.generator = shape, device, generator
        self.streams = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self) -> Tensor:
        """Return fresh numbers in [0, 1), (batch, seq) float64."""
        if self.streams is None:
            where = self.device if self.generator is None else self.generator.device
            numbers = torch.rand(self.shape, dtype=torch.float64, generator=self.generator, device=where)
        else:
            rows = [torch.rand(self.shape[1], dtype=torch.float64, generator=stream) for stream in self.streams]
            numbers = torch.stack(rows)
        return numbers.to(self.device, non_blocking=True)
