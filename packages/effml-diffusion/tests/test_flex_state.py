from __future__ import annotations

import pytest
import torch
from effml_diffusion.flex.flex_state import FlexState, observe
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

MASK, PAD = 90, 91


def build(rows: list[list[int]], kinds: list[list[int]], closed: Tensor | None = None) -> FlexState:
    """kinds: 0 absent, 1 masked, 2 clean, for every token."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows], dtype=torch.int64).view(len(rows), width)
    kind = torch.tensor([row + [2] * (width - len(row)) for row in kinds]).view(len(rows), width)
    lengths, t = torch.tensor([len(row) for row in rows]), torch.full((len(rows),), 0.5)
    return observe(ids, lengths, kind > 0, kind == 1, t, mask_id=MASK, pad_id=PAD, closed=closed)


@pytest.mark.parametrize(
    ("kinds", "gaps"),
    [([0, 2, 0, 2], [1, 1, 0]), ([0, 0, 0, 0], [4]), ([2, 2, 2, 2], [0, 0, 0, 0, 0])],
)
def test_gaps(kinds: list[int], gaps: list[int]) -> None:
    state = build([[5, 6, 7, 8]], [kinds])
    assert state.gaps[0, : len(gaps)].tolist() == gaps
    assert state.gap_mask[0].tolist() == [i < len(gaps) for i in range(5)]  # a full row has its last gap too
    assert not state.gaps[0, len(gaps) :].any()


rows = st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=7), min_size=1, max_size=4)


@settings(deadline=None)
@given(rows)
def test_equals_a_loop_over_rows(batch: list[list[tuple[int, int]]]) -> None:
    texts, kinds = [[token for token, _ in row] for row in batch], [[kind for _, kind in row] for row in batch]
    state = build(texts, kinds)
    for row, (text, kind) in enumerate(zip(texts, kinds, strict=True)):
        places = [i for i, k in enumerate(kind) if k]
        ends = [-1, *places, len(text)]
        k = len(places)
        assert int(state.lengths[row]) == k
        assert state.ids[row].tolist() == [MASK if kind[i] == 1 else text[i] for i in places] + [PAD] * (
            state.ids.shape[1] - k
        )
        assert state.mask[row].tolist() == [kind[i] == 1 for i in places] + [False] * (state.ids.shape[1] - k)
        assert state.targets[row, :k].tolist() == [text[i] for i in places]
        assert state.places[row, :k].tolist() == places
        assert state.places[row, k:].tolist() == [len(text)] * (state.ids.shape[1] - k)
        assert state.gaps[row].tolist() == [ends[i + 1] - ends[i] - 1 for i in range(k + 1)] + [0] * (
            state.ids.shape[1] - k
        )
        assert int(state.gaps[row].sum()) == len(text) - k


def test_closed_junctions_are_no_gaps_wherever_their_tokens_move() -> None:
    closed = torch.zeros(2, 5, dtype=torch.bool)
    closed[0, 2] = True  # between tokens 1 and 2
    closed[1, 4] = True  # after the last
    state = build([[5, 6, 7, 8], [5, 6, 7, 8]], [[0, 2, 2, 0], [0, 0, 0, 2]], closed)
    assert state.gap_mask.tolist() == [[True, False, True, False, False], [True, False, False, False, False]]


def test_trimming_keeps_what_is_there() -> None:
    state = build([[5, 6, 7, 8, 9]] * 2, [[0, 1, 0, 2, 0], [0, 0, 0, 0, 1]])
    small = state.trim()
    assert small.ids.tolist() == [[MASK, 8], [MASK, PAD]]
    assert small.gaps.tolist() == [[1, 1, 1], [4, 0, 0]]
    assert small.gap_mask.shape == (2, 3)
    assert state.trim(4).ids.shape == (2, 4)
    assert state.trim(64).ids.shape == (2, 5)
    empty = build([[5, 6]], [[0, 0]]).trim()
    assert empty.ids.tolist() == [[PAD]]
    assert empty.gaps.tolist() == [[2, 0]]


def test_batches_of_nothing_but_empty_texts() -> None:
    state = build([[], []], [[], []])
    assert state.ids.shape == (2, 0)
    assert state.gaps.tolist() == [[0], [0]]
    assert state.gap_mask.all()
    assert state.trim().ids.shape == (2, 0)
