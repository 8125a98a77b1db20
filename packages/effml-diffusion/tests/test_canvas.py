from __future__ import annotations

import pytest
import torch
from effml_diffusion.flex.canvas import Canvas
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st

MASK, PAD = 90, 91


def test_what_is_given_says_which_gaps_are_open() -> None:
    assert Canvas.empty(2).open_gaps.tolist() == [[True], [True]]
    assert Canvas.prompt([[1, 2], []]).open_gaps.tolist() == [[False, False, True], [True, False, False]]
    infill = Canvas.infill([[1], [], [1, 2]], [[3, 4], [5], []])
    assert infill.ids[0].tolist() == [1, 3, 4]
    assert infill.lengths.tolist() == [3, 1, 2]
    assert [row.nonzero().flatten().tolist() for row in infill.open_gaps] == [[1], [0], [2]]
    closed_ends = Canvas.waypoints([[1, 2, 3], [4]])
    assert closed_ends.open_gaps.tolist() == [[False, True, True, False], [False] * 4]
    assert Canvas.waypoints([[1, 2]], open_ends=True).open_gaps.tolist() == [[True] * 3]


def test_tensors_are_accepted_and_not_changed() -> None:
    given_ids = torch.tensor([[1, 2], [3, 4]])
    canvas = Canvas.prompt(given_ids)
    grown = canvas.insert(torch.tensor([[0, 0, 1], [0, 0, 2]]), mask_id=MASK, pad_id=PAD)
    assert grown.ids.tolist() == [[1, 2, MASK, PAD], [3, 4, MASK, MASK]]
    assert given_ids.tolist() == canvas.ids.tolist() == [[1, 2], [3, 4]]
    revealed = grown.reveal(torch.tensor([2, 7]), torch.tensor([8, 9]))
    assert revealed.ids.tolist() == [[1, 2, 8, PAD], [3, 4, MASK, 9]]
    assert grown.ids.tolist() == [[1, 2, MASK, PAD], [3, 4, MASK, MASK]]


texts = st.lists(st.integers(0, 9), max_size=5)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(texts, st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=6, max_size=6)), min_size=1
    )
)
def test_insertion_equals_a_loop_over_rows(batch: list[tuple[list[int], list[tuple[int, bool]]]]) -> None:
    rows = [row for row, _ in batch]
    canvas = Canvas.waypoints(rows, open_ends=True)
    width = canvas.ids.shape[1] + 1
    counts = torch.tensor([[count for count, _ in gaps[:width]] for _, gaps in batch])
    closed = torch.tensor([[shut for _, shut in gaps[:width]] for _, gaps in batch])
    grown = Canvas(canvas.ids, canvas.lengths, closed).insert(counts, mask_id=MASK, pad_id=PAD)
    for i, row in enumerate(rows):
        expected, gaps = [], []
        for gap in range(len(row) + 1):
            new = 0 if closed[i, gap] else int(counts[i, gap])
            expected += [MASK] * new
            gaps += [False] * new + [bool(closed[i, gap])]
            expected += row[gap : gap + 1]
        n = len(expected)
        assert int(grown.lengths[i]) == n
        assert grown.ids[i].tolist() == expected + [PAD] * (grown.ids.shape[1] - n)
        assert grown.closed[i, : n + 1].tolist() == gaps
    assert grown.ids.shape[1] == max(1, int(grown.lengths.max()))


def test_padding_to_a_multiple() -> None:
    canvas = Canvas.prompt([[1, 2, 3], [4]]).padded(PAD, 8)
    assert canvas.ids.tolist() == [[1, 2, 3] + [PAD] * 5, [4] + [PAD] * 7]
    assert canvas.masks(PAD).sum() == 0  # pads are no tokens
    assert Canvas.empty(2).padded(PAD).ids.tolist() == [[PAD], [PAD]]


def test_wrong_canvases() -> None:
    with pytest.raises(ConfigError, match=r"batch: got 0"):
        Canvas.empty(0)
    with pytest.raises(ConfigError, match=r"suffix: got 1 rows, expected 2, one for each prefix"):
        Canvas.infill([[1], [2]], [[3]])
    with pytest.raises(ConfigError, match=r"ids, lengths, closed: got \(1, 2\), \(1,\) and \(1, 2\)"):
        Canvas(torch.zeros(1, 2), torch.ones(1), torch.ones(1, 2))
