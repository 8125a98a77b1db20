from __future__ import annotations

import math

import pytest
import torch
from effml_eval.concepts.bridge import BridgeEdges
from effml_eval.experiments.paired_world import PairedWorldConfig, linked_fraction, make_world
from effml_shared.errors import ConfigError


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_world_and_its_pairs_repeat_and_have_the_stated_laws() -> None:
    world = make_world(PairedWorldConfig(), seed=1)
    assert torch.equal(world.image_atoms, make_world(PairedWorldConfig(), seed=1).image_atoms)
    assert not torch.equal(world.image_atoms, make_world(PairedWorldConfig(), seed=2).image_atoms)
    pairs, again = (world.draw(4000, _generator()) for _ in range(2))
    assert torch.equal(pairs.image, again.image)
    assert torch.equal(pairs.text, again.text)
    for side in pairs[:2]:
        torch.testing.assert_close(side.norm(dim=1), torch.ones(4000))
    assert pairs.concepts.shape == (4000, 5)
    assert (pairs.concepts.sort(1).values.diff(dim=1) > 0).all()
    for atoms in (world.image_atoms, world.text_atoms, world.axis[None]):
        torch.testing.assert_close(atoms.norm(dim=1), torch.ones(len(atoms)))


def test_frequencies_fall_as_the_power_says() -> None:
    world = make_world(PairedWorldConfig(per_pair=1), seed=0)
    counts = world.draw(60_000, _generator()).concepts.flatten().bincount(minlength=96).double()
    law = (1.0 + torch.arange(96, dtype=torch.float64)) ** -0.7
    torch.testing.assert_close(counts / counts.sum(), law / law.sum(), atol=0.003, rtol=0.05)


def test_without_replacement_is_drawing_one_after_the_other() -> None:
    world = make_world(PairedWorldConfig(dim=2, concepts=3, per_pair=2, decay=1.0), seed=0)
    first, second = world.draw(100_000, _generator()).concepts.sort(1).values.T
    p = torch.tensor([6 / 11, 3 / 11, 2 / 11])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        expected = p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
        assert float(((first == i) & (second == j)).double().mean()) == pytest.approx(float(expected), abs=0.006)


def test_sides_share_what_they_mean_and_are_parted_along_the_axis() -> None:
    laws = PairedWorldConfig(noise=0.0, gap=0.0, shared=1.0)
    world = make_world(laws, seed=0)
    torch.testing.assert_close(world.image_atoms, world.text_atoms)
    torch.testing.assert_close(make_world(PairedWorldConfig(shared=0.0), 0).image_atoms.norm(dim=1), torch.ones(96))
    parted = make_world(PairedWorldConfig(), seed=0)
    pairs = parted.draw(2000, _generator())
    together = make_world(PairedWorldConfig(gap=0.0), seed=0).draw(2000, _generator())
    for (image, text, _), low, high in ((pairs, 0.3, 0.8), (together, -0.1, 0.1)):
        assert low < ((image - text) @ parted.axis).mean() < high


def test_bridges_between_true_atoms_of_one_concept_are_linked() -> None:
    world = make_world(PairedWorldConfig(), seed=0)
    atoms = torch.cat([world.image_atoms, world.text_atoms])
    own = torch.arange(96)
    assert linked_fraction(world, atoms, BridgeEdges(own, own + 96, torch.ones(96))) == 1
    assert linked_fraction(world, atoms, BridgeEdges(own, own.roll(1) + 96, torch.ones(96))) == 0
    assert math.isnan(linked_fraction(world, atoms, BridgeEdges(own[:0], own[:0], torch.ones(0))))


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"^per_pair: got 5, expected at most the 4 concepts$"):
        PairedWorldConfig(concepts=4)
    with pytest.raises(ConfigError, match=r"^shared: got 1.5"):
        PairedWorldConfig(shared=1.5)
    assert len(make_world(PairedWorldConfig(), 0).draw(0, _generator()).image) == 0
