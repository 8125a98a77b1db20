"""Ranking against sorting Python tuples row by row."""

from __future__ import annotations

import torch
from effml_diffusion.samplers.ranking import best_per_row, flat_index, ranks
from hypothesis import given, settings
from hypothesis import strategies as st

SCORES = st.sampled_from([-float("inf"), -1.0, 0.0, 0.5, 0.5, 2.0])


@st.composite
def tables(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 7))
    score = [[draw(SCORES) for _ in range(width)] for _ in range(rows)]
    tier = [[draw(st.integers(0, 2)) for _ in range(width)] for _ in range(rows)]
    count = [draw(st.integers(0, width + 1)) for _ in range(rows)]
    return torch.tensor(score), torch.tensor(tier), torch.tensor(count)


@given(tables())
@settings(max_examples=60, deadline=None)
def test_tiers_then_scores_then_positions(table: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    score, tier, count = table
    place = ranks(score, tier)
    for row in range(len(score)):
        width = score.shape[1]
        order = sorted(range(width), key=lambda i: (-int(tier[row, i]), -float(score[row, i]), i))
        assert place[row].argsort().tolist() == order

    eligible = tier > 0
    best = best_per_row(score, eligible, count)
    for row in range(len(score)):
        candidates = [i for i in range(score.shape[1]) if eligible[row, i]]
        candidates.sort(key=lambda i: (-float(score[row, i]), i))
        assert best[row].nonzero().flatten().tolist() == sorted(candidates[: int(count[row])])


def test_a_column_of_counts_equals_one_count() -> None:
    score, eligible = torch.tensor([[0.1, 0.9, 0.9], [3.0, 2.0, 1.0]]), torch.ones(2, 3, dtype=torch.bool)
    assert torch.equal(best_per_row(score, eligible, 2), best_per_row(score, eligible, torch.tensor([2, 2])))


def test_flat_indices_with_and_without_their_number() -> None:
    mask = torch.tensor([[False, True], [True, True]])
    assert flat_index(mask).tolist() == flat_index(mask, 3).tolist() == [1, 2, 3]
    assert flat_index(mask.T).tolist() == [1, 2, 3]
    assert flat_index(mask & False).tolist() == flat_index(mask & False, 0).tolist() == []
