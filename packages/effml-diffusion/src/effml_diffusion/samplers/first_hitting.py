"""First-hitting sampling: the masking process walked back exactly, one token of a row per forward pass.

With M masks left at mask level u, the next is revealed at level u U^(1/M): the levels at which the M masks of a row are
revealed are M independent uniform numbers, in decreasing order. So this is ancestral sampling on an infinitely fine
grid; for a network that is not told the time, it is decoding in random order. M passes.

Source: arXiv 2409.02908.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from effml_diffusion.samplers.decoding import Decoding, Sampler
from effml_diffusion.samplers.ranking import ranks
from effml_diffusion.samplers.reveal_order import reveal_in_order

__all__ = ["FirstHitting"]


@dataclass(frozen=True)
class FirstHitting(Sampler):
    """Reveal tokens one by one in random order, at the times of the masking process."""

    def decode(self, state: Decoding) -> None:
        level = state.noise.draw()
        schedule = state.diffusion.schedule
        when = ranks(level, tier=state.masked.byte())

        by_rank = level.new_empty(level.shape).scatter_(1, when, level)

        def time_of(rank: Tensor) -> Tensor:
            # relative to the level at t = 1, which some schedules leave below 1
            return schedule.inverse(1 - by_rank.gather(1, rank[:, None]).squeeze(1) * schedule.mask_level(1.0))

        reveal_in_order(state, when, state.masked, time_of)
