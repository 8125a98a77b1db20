"""The laws of masks and times: every position, subset and stratum as often as it should be."""

from itertools import combinations

import pytest
import torch
from effml_diffusion.corruption import mask_at_random, mask_exactly, stratified_times
from effml_shared.seeding import generator

CPU = torch.device("cpu")


def test_each_stratum_has_one_time_over_all_ranks() -> None:
    for ranks, rows in ((1, 1), (1, 7), (3, 4)):
        streams = [generator(0, "times", rank) for rank in range(ranks)]
        times = [
            stratified_times(rows, rank=r, world_size=ranks, device=CPU, generator=g) for r, g in enumerate(streams)
        ]
        every = torch.cat(times)
        assert (every > 0).all()
        strata = (every * ranks * rows).ceil() - 1
        assert sorted(strata.tolist()) == list(range(ranks * rows))


def test_every_row_has_uniform_times() -> None:
    """Not only the batch: the first row must not always be the least corrupted one."""
    stream = generator(0, "rows")
    times = torch.stack([stratified_times(4, device=CPU, generator=stream) for _ in range(4000)])
    sigma = (1 / 12 / 4000) ** 0.5
    assert ((times.mean(0) - 0.5).abs() < 4 * sigma).all()
    assert ((times.square().mean(0) - 1 / 3).abs() < 0.02).all()
    assert times.mean(1).std() < 0.5 * (1 / 12 / 4) ** 0.5  # what stratification is for


def test_levels_are_probabilities_of_masks() -> None:
    maskable = torch.ones(3, 20000, dtype=torch.bool)
    maskable[:, ::2] = False
    mask = mask_at_random(maskable, torch.tensor([0.0, 0.3, 1.0]), generator(0, "levels"))
    assert not mask[:, ::2].any()
    counts = mask.sum(1).tolist()
    assert counts[0] == 0
    assert counts[2] == 10000
    assert abs(counts[1] - 3000) < 4 * (10000 * 0.3 * 0.7) ** 0.5


def test_subsets_of_a_size_are_equally_likely() -> None:
    n = 12000
    maskable = torch.tensor([True, False, True, True, True]).expand(n, -1)
    mask = mask_exactly(maskable, torch.full((n,), 2), generator(0, "subsets"))
    assert (mask.sum(1) == 2).all()
    for pair in combinations((0, 2, 3, 4), 2):
        share = mask[:, list(pair)].all(1).double().mean().item()
        assert share == pytest.approx(1 / 6, abs=4 * (5 / 36 / n) ** 0.5)


def test_counts_may_differ_by_row() -> None:
    maskable = torch.tensor([[True] * 4, [True] * 4, [False] * 4, [False, True, False, True]])
    mask = mask_exactly(maskable, torch.tensor([0, 4, 0, 2]))
    assert mask.tolist() == [[False] * 4, [True] * 4, [False] * 4, [False, True, False, True]]


def test_no_rows_and_no_columns() -> None:
    assert stratified_times(0, device=CPU).shape == (0,)
    assert mask_exactly(torch.ones(0, 3, dtype=torch.bool), torch.zeros(0)).shape == (0, 3)
    assert mask_at_random(torch.ones(2, 0, dtype=torch.bool), torch.ones(2)).shape == (2, 0)
