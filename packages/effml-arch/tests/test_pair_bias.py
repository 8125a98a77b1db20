from __future__ import annotations

import math

import pytest
import torch
from effml_arch.recurrent.pair_bias import PairBias, add_bias

LIKE = torch.zeros(0, dtype=torch.float64)
SLOTS = range(9)


def everything() -> PairBias:
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[0, :3] = False
    return PairBias(alibi_heads=4, key_valid=valid, doc_ids=torch.tensor([[0] * 5 + [1] * 4] * 2), window=4)


def test_every_entry_follows_from_its_pair() -> None:
    bias = everything()
    got = bias.tile(SLOTS, SLOTS, LIKE)
    assert got is not None
    assert got.shape == (2, 4, 9, 9)
    for b, h, t, j in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(9), torch.arange(9)).tolist():
        if j > t:
            continue
        hidden = (b == 0 and j < 3) or (t < 5) != (j < 5) or t - j >= 4
        assert got[b, h, t, j] == (-math.inf if hidden else -(2.0 ** (-2 * (h + 1))) * (t - j))


def test_a_tile_is_a_part_of_the_whole() -> None:
    bias = everything()
    whole, part = bias.tile(SLOTS, SLOTS, LIKE), bias.tile(range(5, 8), range(1, 5), LIKE)
    assert whole is not None
    assert part is not None
    assert torch.equal(part, whole[:, :, 5:8, 1:5])


def test_nothing_to_add_is_none() -> None:
    assert PairBias().tile(SLOTS, SLOTS, LIKE) is None
    assert PairBias(window=9).tile(SLOTS, SLOTS, LIKE) is None
    assert PairBias(window=8).tile(SLOTS, SLOTS, LIKE) is not None


def test_the_oldest_visible_slot() -> None:
    assert [PairBias(window=3).oldest(slot) for slot in range(6)] == [0, 0, 0, 1, 2, 3]
    assert PairBias().oldest(100) == 0


@pytest.mark.parametrize("heads", [1, 4])
def test_rows_of_a_group_are_neighbours(heads: int) -> None:
    bias, group = torch.randn(2, heads, 3, 5), 2  # 2 rows, 4 query heads on 2 key heads, 3 queries, 5 keys
    got = add_bias(torch.zeros(4, 6, 5), bias, batch=2, group=group)
    for b in range(2):
        for h in range(4):
            assert torch.equal(got[2 * b + h // group, h % group :: group], bias[b, h % heads])
