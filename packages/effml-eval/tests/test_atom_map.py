from __future__ import annotations

import numpy as np
import pytest
import torch
from effml_eval.explorer.atom_map import atom_map, nearest_atoms, repulsion
from effml_shared.errors import ConfigError
from torch import Tensor


def _clusters(count: int, clusters: int, dim: int = 24, *, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(clusters, dim, generator=g)[torch.arange(count) % clusters] + 0.5 * torch.randn(
        count, dim, generator=g
    )


def test_nearest_atoms_are_those_of_all_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    atoms = _clusters(50, 5)
    cosines = torch.nn.functional.cosine_similarity(atoms[:, None], atoms[None], dim=2).fill_diagonal_(-2)
    expected = cosines.topk(7, dim=1)
    whole = nearest_atoms(atoms * torch.rand(50, 1).add(0.1), 7)
    torch.testing.assert_close(whole.cosines, expected.values)
    assert torch.equal(whole.indices, expected.indices)
    monkeypatch.setattr("effml_eval.explorer.atom_map.BLOCK", 150)  # six rows at a time
    assert torch.equal(nearest_atoms(atoms, 7).indices, expected.indices)
    assert nearest_atoms(atoms[:3], 7).indices.shape == (3, 2)


@pytest.mark.parametrize(("spread", "tolerance"), [(1e-4, 1e-4), (0.3, 1e-3), (1.0, 2e-3), (5.0, 0.03), (20.0, 0.07)])
def test_repulsion_is_that_of_all_pairs(spread: float, tolerance: float) -> None:
    y = np.random.default_rng(0).normal(size=(400, 2)) * spread
    apart = y[:, None] - y
    q = 1 / (1 + (apart**2).sum(2))
    exact = (q[:, :, None] ** 2 * apart).sum(1)
    push, normaliser = repulsion(y)
    assert np.linalg.norm(push - exact) < tolerance * np.linalg.norm(exact)
    assert normaliser == pytest.approx(q.sum() - len(y), rel=1e-3)


def test_a_point_does_not_repel_itself() -> None:
    for y in ([[3.0, 4.0]], [[0.0, 0.0], [300.0, 170.3]]):  # two points 345 apart, on cells half a unit wide
        push, normaliser = repulsion(np.array(y))
        assert np.abs(push).max() < 1e-4
        assert normaliser == pytest.approx(0.0, abs=1e-4)


def test_clusters_stay_together_and_every_run_is_the_same() -> None:
    atoms = _clusters(240, 8)
    places = atom_map(atoms)
    assert places.shape == (240, 2)
    assert places.dtype == torch.float32
    assert float(places.abs().max()) == pytest.approx(1.0)
    assert torch.equal(places, atom_map(4 * atoms))  # only directions count
    nearest = torch.cdist(places, places).fill_diagonal_(9).topk(5, largest=False).indices
    assert (nearest % 8 == torch.arange(240)[:, None] % 8).float().mean() > 0.98
    assert torch.equal(places, atom_map(atoms, nearest_atoms(atoms, 15)))


@pytest.mark.parametrize(
    "atoms",
    [
        torch.ones(1, 3),
        torch.eye(2),
        torch.ones(9, 4),  # all the same
        torch.zeros(5, 3),  # no direction at all
        torch.linspace(-1, 1, 40)[:, None],  # one dimension
        torch.cat([torch.eye(16), -torch.eye(16)]),
    ],
)
def test_odd_dictionaries_have_a_map(atoms: Tensor) -> None:
    places = atom_map(atoms, steps=60)
    assert places.shape == (len(atoms), 2)
    assert bool(places.isfinite().all())
    assert float(places.abs().max()) <= 1.0
    assert len(places.unique(dim=0)) == len(atoms)


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"dictionary: number of atoms"):
        atom_map(torch.ones(0, 3))
    with pytest.raises(ConfigError, match=r"^dictionary"):
        atom_map(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(ConfigError, match=r"^dictionary: got shape \(3,\)"):
        nearest_atoms(torch.ones(3), 2)
    with pytest.raises(ConfigError, match=r"^count: got 0"):
        nearest_atoms(torch.eye(3), 0)
    with pytest.raises(ConfigError, match=r"^steps: got 0"):
        atom_map(torch.eye(3), steps=0)


@pytest.mark.slow
def test_ten_thousand_atoms() -> None:
    atoms = _clusters(10_000, 50)
    places = atom_map(atoms)
    nearest = torch.cdist(places, places).fill_diagonal_(9).argmin(1)
    assert (nearest % 50 == torch.arange(10_000) % 50).float().mean() > 0.98
