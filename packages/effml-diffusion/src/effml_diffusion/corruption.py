"""Corrupting sequences: which tokens are replaced by the mask, and with what weight the loss counts them.

Two laws of the mask, both independent of the tokens. Given a level u, every maskable token is masked with probability
u, and the weighted sum w sum_masked CE averages to the likelihood bound over levels. Given a count l, a uniformly
chosen subset of l of the n maskable tokens is masked with weight n / l, and the sum averages to the same bound over l
uniform on 1..n: with less variance, since no level is small by chance and no sequence stays without a mask.

Times of a batch are stratified: one per stratum of equal width, over all ranks together, so that the batch's mean
weight hardly varies. The strata are dealt to the rows in random order (our own; the papers deal them in order): else
the first row of a batch would always be the least corrupted one.

No state; O(batch x seq log seq) for counts, O(batch x seq) else. Noise is float64: in float32 a level below 2^-24 would
mask with probability 2^-24. Sources: arXiv 2406.07524 (levels, stratification), 2502.09992 (counts).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Corruption", "mask_at_random", "mask_exactly", "stratified_times", "uniform"]


class Corruption(NamedTuple):
    """Corrupted sequences; index a field, not the tuple, to take rows."""

    z: Tensor  # (batch, seq), the ids with masks
    mask: Tensor  # (batch, seq) bool, where z is masked
    t: Tensor  # (batch,) float64, diffusion time
    weight: Tensor  # (batch,) float64, of the cross-entropy at masked positions; 0 at level 0
    maskable: Tensor  # (batch, seq) bool, where a mask was possible


def uniform(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Draw float64 numbers on [0, 1), on the generator's device and then moved."""
    source = device if generator is None else generator.device
    return torch.rand(shape, dtype=torch.float64, device=source, generator=generator).to(device)


def stratified_times(
    n: int, *, rank: int = 0, world_size: int = 1, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Draw n times on (0, 1], one per stratum of width 1 / (n world_size), in random order: (n,) float64.

    Rank r of W has every W-th stratum from the r-th; together the ranks have each once.
    """
    order = uniform((n,), device, generator).argsort()
    return (order * world_size + rank + 1 - uniform((n,), device, generator)) / (n * world_size)


def mask_at_random(maskable: Tensor, level: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Choose each of the maskable positions (batch, seq) with probability level (batch,): bool (batch, seq)."""
    return maskable & (uniform(tuple(maskable.shape), maskable.device, generator) < level[:, None])


def mask_exactly(maskable: Tensor, count: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Choose a uniformly random subset of count (batch,) of the maskable positions (batch, seq): bool (batch, seq)."""
    noise = uniform(tuple(maskable.shape), maskable.device, generator).masked_fill(~maskable, 2.0)
    return noise.argsort(dim=1).argsort(dim=1) < count[:, None]
