"""Samplers whose order of revealing owes nothing to the network: it is drawn first, for every position, and replayed.

Where in time a position is revealed is a property of the mask law alone, so all forward passes can be planned: one for
every moment at which a row reveals something. What public code gets from caching the network's output while nothing
changes, this gets without asking; and since rows do not depend on each other, the j-th moments of all rows share a
pass, though their times differ. A batch so takes as many passes as its busiest row has moments, never more than seq,
and each pass reads logits only where it reveals.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from effml_diffusion.samplers.decoding import Decoding

__all__ = ["moments", "reveal_in_order"]


def moments(when: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Number the distinct values of every row, smallest first, among counted positions.

    when (batch, seq) int64, counted (batch, seq) bool -> the number of each position's value, -1 where not counted,
    and the value that a row's j-th number stands for (batch, seq); for numbers a row does not have, its last one.

    >>> number, value = moments(torch.tensor([[7, 3, 7, 0]]), torch.tensor([[True, True, True, False]]))
    >>> number.tolist(), value.tolist()
    ([[1, 0, 1, -1]], [[3, 7, 7, 7]])
    """
    last = when.masked_fill(~counted, 0).amax(1, keepdim=True)
    ordered, order = torch.where(counted, when, last).sort(dim=1)
    number = F.pad((ordered.diff(dim=1) != 0).long().cumsum(1), (1, 0))
    value = last.expand_as(when).scatter(1, number, ordered)
    return torch.empty_like(number).scatter_(1, order, number).masked_fill(~counted, -1), value


def reveal_in_order(
    state: Decoding, when: Tensor, counted: Tensor, time_of: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Reveal counted positions (batch, seq) in the order of `when` (batch, seq) int64, equal ones of a row together.

    time_of gives for a position's `when` (batch,) the diffusion time to tell the network; None: as `Decoding.predict`.
    """
    number, value = moments(when, counted)
    sizes = number.flatten().add(1).bincount().tolist()[1:]  # the one time that the host waits
    uniform, told = state.noise.draw(), state.diffusion.time_conditioning != "none"
    for j, size in enumerate(sizes):
        t = time_of(value[:, j]) if time_of is not None and told else None
        prediction = state.predict(number == j, size, t)
        tokens, _ = state.draw(prediction, uniform)
        state.reveal(prediction.index, tokens)
        state.end_step()
