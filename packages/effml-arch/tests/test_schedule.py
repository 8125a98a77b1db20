from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from effml_arch.recurrent.schedule import SCHEDULES, pull_schedule, schedule, tile_schedule
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st


@given(kind=st.sampled_from(SCHEDULES), n=st.integers(1, 70), base=st.integers(1, 17))
def test_every_pair_of_different_blocks_is_covered_once_and_in_time(kind: str, n: int, base: int) -> None:
    covered = torch.zeros(n, n, dtype=torch.int64)
    for c, (q0, q1, k0, k1) in schedule(kind, n, base).items():
        assert c == q0 == k1  # all its keys are finished, none of its queries is
        assert q0 % base == 0
        covered[q0:q1, k0:k1] += 1
    block = torch.arange(n) // base
    assert torch.equal(covered, (block[:, None] > block).long())


@pytest.mark.parametrize("n", [127, 128, 129, 1000, 1024])
def test_tiles_cover_long_sequences(n: int) -> None:
    covered = torch.zeros(n, n, dtype=torch.int8)
    for q0, q1, k0, k1 in tile_schedule(n):
        covered[q0:q1, k0:k1] += 1
    assert torch.equal(covered, torch.ones(n, n, dtype=torch.int8).tril(-1))


@pytest.mark.parametrize(("n", "rows"), [(512, 2304), (1000, 5052), (1024, 5120), (2048, 11264), (4096, 24576)])
def test_tiles_read_n_log_n_key_rows(n: int, rows: int) -> None:
    tiles = list(tile_schedule(n))
    assert len(tiles) == n - 1
    assert sum(tile.k1 - tile.k0 for tile in tiles) == rows
    assert sum(tile.k1 - tile.k0 for tile in pull_schedule(n)) == n * (n - 1) // 2


def test_tiles_of_eight_positions() -> None:
    expected = [(1, 2, 0, 1), (2, 4, 0, 2), (3, 4, 2, 3), (4, 8, 0, 4), (5, 6, 4, 5), (6, 8, 4, 6), (7, 8, 6, 7)]
    assert [tuple(tile) for tile in tile_schedule(8)] == expected


def test_base_blocks_save_tiles_and_keep_their_order() -> None:
    assert len(list(tile_schedule(100))) == 99
    tiles = list(tile_schedule(100, 16))
    assert len(tiles) == 6
    assert all(a.q0 < b.q0 for a, b in pairwise(tiles))


@pytest.mark.parametrize(("kind", "n", "base"), [("push", 4, 1), ("tile", 0, 1), ("pull", 4, 0), ("tile", 4, 1.5)])
def test_bad_arguments_are_named(kind: str, n: int, base: int) -> None:
    with pytest.raises(ConfigError, match=r"expected"):
        schedule(kind, n, base)
