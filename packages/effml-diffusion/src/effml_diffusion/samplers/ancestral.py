"""Ancestral sampling: walk back the masking process on a grid of times, drawing every token once.

From t to s < t a mask is revealed with probability (alpha(s) - alpha(t)) / (1 - alpha(t)), whatever its token. Over the
whole walk, a position so stays masked down to the level (1 - alpha) that one uniform number prescribes, and the step
that reveals it is known beforehand (`reveal_order`): `steps` sets the law's fineness, not its cost, which is the
number of different steps in which a row reveals something, min(steps, masks of the row) at most, plus one pass for what
is left at the end of the grid. Two tokens revealed in one step are independent given the state: the only error.

Source: arXiv 2406.07524, section 3, and its code for the grid and its end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_diffusion.samplers.decoding import Decoding, Sampler
from effml_diffusion.samplers.reveal_order import reveal_in_order

__all__ = ["Ancestral"]


@dataclass(frozen=True)
class Ancestral(Sampler):
    """Reveal tokens in `steps` steps of equal time, from t = 1 to eps.

    Attributes:
        steps: of the grid.
        final: what becomes of masks left at its end: `"argmax"`, the likeliest token, or `"sample"`.
        eps: the last time, so that a network is never asked at 0.
    """

    steps: int = 1000
    final: str = "argmax"
    eps: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps, 1)
        check_choice("final", self.final, ("argmax", "sample"))
        if not 0 <= self.eps < 1:
            raise ConfigError(f"eps: got {self.eps}, expected a time in [0, 1)")

    def decode(self, state: Decoding) -> None:
        times = torch.linspace(1, self.eps, self.steps + 1, dtype=torch.float64)
        level = state.diffusion.schedule.mask_level(times)
        still_masked = (level[1:] / level[0]).to(state.ids.device)  # after every step, decreasing
        # A position is masked after the steps whose share of masks is above its number.
        uniform = state.noise.draw()
        when = self.steps - torch.searchsorted(still_masked.flip(0), uniform, right=True)
        times = times.to(when.device)

        def time_of(when: Tensor) -> Tensor:
            return times[when.clamp(max=self.steps - 1)]

        reveal_in_order(state, when, state.masked & (when < self.steps), time_of)
        state.fill(greedy=self.final == "argmax")
