"""Numbers of tokens per step: both public conventions, exact sums, blocks row by row."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from effml_diffusion.samplers.counts import explicit_counts, reveal_counts
from effml_diffusion.schedules import schedule
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st

LINEAR = schedule("linear")


def test_the_two_conventions() -> None:
    assert reveal_counts(torch.tensor([22]), 4).reveal.flatten().tolist() == [6, 6, 5, 5]
    assert reveal_counts(torch.tensor([22]), 4, schedule=LINEAR).reveal.flatten().tolist() == [6, 5, 6, 5]


@pytest.mark.parametrize("name", [None, "linear", "cosine", "polynomial(2)", "geometric(1e-3, 20)"])
def test_sums_are_exact_for_all_sizes(name: str | None) -> None:
    masks = torch.arange(65)
    for steps in range(1, 65) if name in (None, "linear") else (1, 2, 7, 64):
        plan = reveal_counts(masks, steps, schedule=None if name is None else schedule(name))
        assert torch.equal(plan.reveal.sum(0), masks)
        assert int(plan.reveal.min()) >= 0
        left = masks - (plan.reveal.cumsum(0) - plan.reveal)
        assert torch.equal(plan.competing, left * (plan.reveal > 0))


def sequential(masks: int, steps: int, scheduled: bool) -> list[int]:
    """One row, one block, in exact numbers."""
    if not scheduled:
        return [masks // steps + (i < masks % steps) for i in range(steps)]
    found = []
    for i in range(steps):
        found.append(round(Fraction(masks, steps - i)))
        masks -= found[-1]
    return found


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.integers(1, 12), st.integers(0, 20), st.booleans())
@settings(max_examples=80, deadline=None)
def test_blocks_row_by_row(masks: list[int], width: int, more: int, scheduled: bool) -> None:
    steps = max(1, -(-max(masks) // width)) + more
    plan = reveal_counts(torch.tensor(masks), steps, block_length=width, schedule=LINEAR if scheduled else None)
    for row, total in enumerate(masks):
        blocks = max(1, -(-total // width))
        expected = []
        for block, share in enumerate(sequential(steps, blocks, False)):
            expected += sequential(max(0, min(width, total - block * width)), share, scheduled)
        assert plan.reveal[:, row].tolist() == expected


def test_explicit_numbers_stop_where_a_row_is_done() -> None:
    plan = explicit_counts(torch.tensor([5, 2, 0]), [1, 0, 3, 9])
    assert plan.reveal.T.tolist() == [[1, 0, 3, 1], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert plan.competing.T.tolist() == [[5, 0, 4, 1], [2, 0, 1, 0], [0, 0, 0, 0]]


def test_impossible_numbers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"steps: got 2, expected at least one for each of 3 blocks"):
        reveal_counts(torch.tensor([9]), 2, block_length=4)
    for counts in ([], [1, 1], [-1, 9]):
        with pytest.raises(ConfigError, match=r"counts: got .* expected none negative and a sum of 3 or more"):
            explicit_counts(torch.tensor([3]), counts)
