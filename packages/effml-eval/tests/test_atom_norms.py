"""Norms of atoms around a step, on both paths."""

import pytest
import torch
from effml_eval.sae import native
from effml_eval.sae.atom_norms import normalize_rows_, remove_parallel_


@pytest.fixture(params=["native", "plain"])
def path(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(native, "serves", lambda *tensors: False)


@pytest.mark.parametrize("shape", [(5, 7), (3, 100), (1, 1)])
def test_gradients_become_tangential_and_atoms_unit(path, shape):
    g = torch.Generator().manual_seed(0)
    atoms, gradient = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    atoms[0] *= 1e3
    expected = gradient - (gradient * atoms).sum(1, keepdim=True) * atoms / atoms.square().sum(1, keepdim=True)
    remove_parallel_(gradient, atoms)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    assert float((gradient * atoms).sum(1).abs().max()) < 1e-9
    unit = atoms / (atoms.norm(dim=1, keepdim=True) + 1e-8)
    normalize_rows_(atoms, 1e-8)
    torch.testing.assert_close(atoms, unit, rtol=1e-12, atol=1e-12)


def test_atoms_of_zero_norm_and_strided_ones(path):
    atoms, gradient = torch.zeros(2, 3), torch.ones(2, 3)
    remove_parallel_(gradient, atoms)
    normalize_rows_(atoms, 1e-8)
    assert torch.equal(gradient, torch.ones(2, 3))
    assert torch.equal(atoms, torch.zeros(2, 3))
    strided = torch.full((3, 2), 2.0).T
    normalize_rows_(strided, 0.0)
    torch.testing.assert_close(strided.norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_atoms_that_overflow_show(path, dtype):
    atoms = torch.ones(3, 4, dtype=dtype)
    atoms[1] = torch.finfo(dtype).max / 2
    normalize_rows_(atoms, 1e-8)
    assert atoms.isnan().all(1).tolist() == [False, True, False]
