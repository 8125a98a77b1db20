"""How many tokens each row reveals in each step, known before the first forward pass.

Two public conventions, both exact, and explicit numbers. `even` splits the masks evenly, the first steps taking the
remainder (LLaDA, arXiv 2502.09992: 22 masks in 4 steps are 6, 6, 5, 5). A schedule reveals what a time step t -> s
would in expectation, rounded half to even, of the masks that are left (dllm: 6, 5, 6, 5 with `linear`). With blocks,
both apply within a block, and a row's steps are split evenly over the row's own blocks.

Computed on the host for all rows at once: O(steps x batch) integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_diffusion.schedules import Schedule

__all__ = ["RevealCounts", "explicit_counts", "reveal_counts"]


class RevealCounts(NamedTuple):
    """What every step does, as int64 on the CPU."""

    reveal: Tensor  # (steps, batch): tokens to reveal
    competing: Tensor  # (steps, batch): masks of the row's block to choose them from; 0 where none is revealed


def reveal_counts(
    masks: Tensor, steps: int, *, block_length: int | None = None, schedule: Schedule | None = None
) -> RevealCounts:
    """Spread the masks (batch,) of every row over the steps: evenly, or as a schedule does.

    Every column sums to the row's masks. With fewer masks than steps, some steps reveal none. A block is block_length
    masks from left to right, the last one maybe fewer.

    Raises:
        ConfigError: a row has more blocks than there are steps.

    >>> reveal_counts(torch.tensor([22]), 4).reveal.flatten().tolist()
    [6, 6, 5, 5]
    """
    masks = masks.cpu().long()
    width = block_length or max(1, int(masks.max()))
    blocks = (-(-masks // width)).clamp(min=1)
    if int(blocks.max()) > steps:
        raise ConfigError(f"steps: got {steps}, expected at least one for each of {int(blocks.max())} blocks")
    short, longer = steps // blocks, steps % blocks  # the first `longer` blocks take one step more
    edge = longer * (short + 1)
    left = torch.zeros_like(masks)
    reveal, competing = [], []
    for step in range(steps):
        in_long = step < edge
        length = short + in_long
        block = torch.where(in_long, step // length, longer + (step - edge) // length)
        local = torch.where(in_long, step % length, (step - edge) % length)
        left = torch.where(local == 0, (masks - block * width).clamp(0, width), left)
        if schedule is None:
            count = -(-left // (length - local))
        else:
            t, s = 1 - local.double() / length, 1 - (local + 1).double() / length
            expected = (left * schedule.hazard(t, s)).round(decimals=9)  # a half stays one in spite of rounding errors
            count = torch.where(local + 1 == length, left, expected.round().long())
        reveal.append(count)
        competing.append(left.where(count > 0, 0))
        left = left - count
    return RevealCounts(torch.stack(reveal), torch.stack(competing))


def explicit_counts(masks: Tensor, counts: Sequence[int]) -> RevealCounts:
    """Reveal counts[j] tokens of every row in step j, or what is left of the row's masks (batch,).

    Raises:
        ConfigError: the counts are negative, or too few for the row with the most masks.

    >>> explicit_counts(torch.tensor([3, 1]), [2, 2]).reveal.tolist()
    [[2, 1], [1, 0]]
    """
    masks = masks.cpu().long()
    numbers = torch.tensor(list(counts), dtype=torch.int64)[:, None]
    if len(numbers) == 0 or int(numbers.min()) < 0 or int(numbers.sum()) < int(masks.max()):
        raise ConfigError(f"counts: got {list(counts)}, expected none negative and a sum of {int(masks.max())} or more")
    left = (masks - (numbers.cumsum(0) - numbers)).clamp(min=0)
    reveal = torch.minimum(numbers.expand_as(left), left)
    return RevealCounts(reveal, left.where(reveal > 0, 0))
