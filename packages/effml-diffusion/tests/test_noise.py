"""Uniform numbers: their grid, their sources, and the independence of rows."""

import pytest
import torch
from effml_diffusion.samplers.noise import Noise
from effml_shared.errors import ConfigError

CPU = torch.device("cpu")


def test_numbers_are_finer_than_float32() -> None:
    numbers = Noise((64, 64), CPU, torch.Generator().manual_seed(0)).draw()
    assert numbers.dtype == torch.float64
    assert 0 <= float(numbers.min()) < float(numbers.max()) < 1
    assert bool((numbers != numbers.float().double()).any())


def test_a_row_with_a_seed_draws_the_same_in_any_batch() -> None:
    many = Noise((3, 5), CPU, seeds=[7, 8, 9])
    alone = Noise((1, 5), CPU, seeds=[8])
    for _ in range(3):
        assert torch.equal(many.draw()[1], alone.draw()[0])


def test_without_anything_the_global_generator_serves() -> None:
    torch.manual_seed(3)
    first = Noise((2, 2), CPU).draw()
    torch.manual_seed(3)
    assert torch.equal(first, Noise((2, 2), CPU).draw())


def test_bad_sources_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"seeds: got 2 of them, expected one for each of 3 rows"):
        Noise((3, 1), CPU, seeds=[1, 2])
    with pytest.raises(ConfigError, match=r"seeds: got a generator too"):
        Noise((1, 1), CPU, torch.Generator(), seeds=[1])
