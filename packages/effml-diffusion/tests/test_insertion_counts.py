from __future__ import annotations

import pytest
import torch
from effml_diffusion.flex.insertion_counts import draw_missing, draw_new, keep_subset, scatter_masks, thin
from hypothesis import given, settings
from hypothesis import strategies as st


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_draws_have_the_moments_of_their_laws() -> None:
    expected = torch.tensor([0.0, 0.3, 0.9, 4.0]).expand(50_000, -1)
    poisson = draw_new(expected, "poisson", generator()).double()
    assert poisson.mean(0).tolist() == pytest.approx([0.0, 0.3, 0.9, 4.0], abs=0.04)
    assert poisson.var(0).tolist() == pytest.approx([0.0, 0.3, 0.9, 4.0], abs=0.12)
    bernoulli = draw_new(expected, "bernoulli", generator()).double()
    assert bernoulli.mean(0).tolist() == pytest.approx([0.0, 0.3, 0.9, 1.0], abs=0.01)
    counts = torch.tensor([0, 1, 10]).expand(50_000, -1)
    thinned = thin(counts, torch.tensor(0.3), generator()).double()
    assert thinned.mean(0).tolist() == pytest.approx([0.0, 0.3, 3.0], abs=0.03)
    assert thinned.var(0).tolist() == pytest.approx([0.0, 0.21, 2.1], abs=0.06)
    assert torch.equal(thin(counts, torch.tensor(1.0), generator()), counts)


def test_missing_tokens_follow_the_heads_distribution_in_open_gaps_only() -> None:
    chance = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 0.1, 0.2, 0.7]], dtype=torch.float64)
    logits = chance.log().expand(20_000, -1, -1)
    open_gaps = torch.tensor([True, True]).expand(20_000, -1).clone()
    open_gaps[:100, 0] = False
    drawn = draw_missing(logits, open_gaps, generator())
    assert not drawn[:100, 0].any()
    for gap in range(2):
        share = drawn[100:, gap].bincount(minlength=4) / 19_900
        torch.testing.assert_close(share.double(), chance[gap], atol=0.015, rtol=0.0)


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 6), min_size=3, max_size=3), min_size=1, max_size=4), st.integers(0, 9))
def test_a_subset_fits_and_is_one(rows: list[list[int]], room: int) -> None:
    counts = torch.tensor(rows)
    rooms = torch.full((len(rows),), room) + torch.arange(len(rows))
    kept = keep_subset(counts, rooms, generator())
    assert torch.equal(kept.sum(1), torch.minimum(counts.sum(1), rooms))
    assert bool((kept <= counts).all())
    assert bool((kept >= 0).all())


def test_the_subset_is_uniform() -> None:
    counts = torch.tensor([[4, 0, 1, 5]]).expand(20_000, -1)
    kept = keep_subset(counts, torch.full((20_000,), 3), generator()).double()
    assert kept.mean(0).tolist() == pytest.approx([1.2, 0.0, 0.3, 1.5], abs=0.02)  # 3/10 of each
    # hypergeometric, without replacement: variance 3 (4/10) (6/10) (10 - 3) / (10 - 1)
    assert float(kept[:, 0].var()) == pytest.approx(0.56, abs=0.02)


def test_masks_are_scattered_by_weight_over_open_gaps() -> None:
    total = torch.tensor([5, 0, 4, 3])
    weights = torch.tensor([[1.0, 3.0, 9.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    open_gaps = torch.tensor([[True, True, False], [True, True, True], [False, True, True], [False, False, False]])
    counts = scatter_masks(total, weights, open_gaps, generator())
    assert counts.sum(1).tolist() == [5, 0, 4, 0]
    assert not counts[~open_gaps].any()
    many = scatter_masks(
        torch.full((5000,), 4), torch.tensor([1.0, 3.0]).expand(5000, -1), torch.ones(5000, 2) > 0, generator()
    )
    assert many.double().mean(0).tolist() == pytest.approx([1.0, 3.0], abs=0.06)
    assert scatter_masks(torch.zeros(2, dtype=torch.int64), weights[:2], open_gaps[:2]).sum() == 0
