from __future__ import annotations

import pytest
import torch
from effml_diffusion.flex.rows import place, right_pad, round_up, row_lengths
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=5))
def test_padding_and_lengths_invert_each_other(rows: list[list[int]]) -> None:
    ids, lengths = right_pad(rows, 0)
    assert ids.dtype == torch.int64
    assert lengths.tolist() == [len(row) for row in rows] == row_lengths(ids, 0).tolist()
    assert [ids[i, :n].tolist() for i, n in enumerate(lengths)] == rows
    assert not ids[torch.arange(ids.shape[1]) >= lengths[:, None]].any()


def test_rows_may_be_tensors_and_booleans() -> None:
    ids, lengths = right_pad([torch.tensor([3, 4]), torch.tensor([5])], 0)
    assert (ids.tolist(), lengths.tolist()) == ([[3, 4], [5, 0]], [2, 1])
    flags, _ = right_pad([[True], [False, True]], False)
    assert flags.dtype == torch.bool
    assert flags.tolist() == [[True, False], [False, True]]


def test_wrong_rows() -> None:
    with pytest.raises(ConfigError, match=r"rows: got shapes \[\], expected at least one row"):
        right_pad([], 0)
    with pytest.raises(ConfigError, match=r"rows: got shapes \[\(\), \(\)\]"):
        right_pad(torch.tensor([1, 2]), 0)
    with pytest.raises(ConfigError, match=r"x: got 2, expected no token to the right of a pad \(7\)"):
        row_lengths(torch.tensor([[1, 7, 2]]), 7)


def test_place_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(1, 9, (6, 4), generator=generator)
    columns = torch.stack([torch.randperm(7, generator=generator)[:4] for _ in range(6)])  # 6: dropped
    expected = torch.zeros(6, 6, dtype=torch.int64)
    for row in range(6):
        for value, column in zip(values[row], columns[row], strict=True):
            if column < 6:
                expected[row, column] = value
    assert torch.equal(place(values, columns, 6, 0), expected)


def test_widths_are_multiples_and_never_0() -> None:
    assert [round_up(n, 8) for n in (0, 1, 8, 9)] == [8, 8, 8, 16]
    assert [round_up(n, 1) for n in (0, 1, 5)] == [1, 1, 5]
