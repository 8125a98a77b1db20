"""Matching pursuit: the worked example, its invariants, and gradients."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from effml_eval.sae.matching_pursuit import matching_pursuit
from effml_eval.sae.sparse_decode import sparse_decode
from effml_eval.sae.sparsifiers import topk_codes
from effml_shared.errors import ConfigError, NonFiniteError

D = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)


def atoms(concepts, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(concepts, dim, generator=generator, dtype=torch.float64), dim=1)


def test_worked_example():
    x = torch.tensor([1.0, 1.0], dtype=torch.float64)
    codes = matching_pursuit(x, D, 2)
    assert codes.indices.tolist() == [2, 0]
    assert codes.values.tolist() == pytest.approx([1.4, 0.16])
    norms = [float((x - matching_pursuit(x, D, k).dense() @ D).square().sum()) for k in (1, 2)]
    assert norms == pytest.approx([0.04, 0.0144])


def test_residual_energy_falls_by_the_squared_coefficient():
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    dictionary = atoms(9, 6)
    before = x.square().sum(1)
    for k in range(1, 8):
        codes = matching_pursuit(x, dictionary, k)
        after = (x - sparse_decode(codes.values, codes.indices, dictionary)).square().sum(1)
        torch.testing.assert_close(after, before - codes.values[:, -1].square(), rtol=1e-12, atol=1e-12)
        before = after


def test_on_an_orthonormal_dictionary_it_is_topk():
    dictionary = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = topk_codes(x @ dictionary.T, 4).dense()
    torch.testing.assert_close(matching_pursuit(x, dictionary, 4).dense(), expected, rtol=0, atol=1e-14)


def test_ties_fall_to_the_lowest_atom_and_nothing_positive_gives_nothing(monkeypatch):
    module = importlib.import_module("effml_eval.sae.matching_pursuit")  # the package gives its function that name
    monkeypatch.setattr(module, "_TILE", 2)
    twice = torch.cat([D, D])
    assert matching_pursuit(torch.tensor([0.6, 0.8], dtype=torch.float64), twice, 1).indices.tolist() == [2]
    codes = matching_pursuit(torch.tensor([[-1.0, -1.0]], dtype=torch.float64), D, 2)
    assert codes.values.tolist() == [[0, 0]]
    assert codes.indices.tolist() == [[0, 0]]
    assert matching_pursuit(torch.zeros(0, 2, dtype=torch.float64), D, 2).values.shape == (0, 2)
    assert matching_pursuit(torch.ones(2, 3, 2, dtype=torch.float64), D, 1).values.shape == (2, 3, 1)


def test_gradients_flow_through_coefficients_and_atoms():
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64, requires_grad=True)

    def reconstruct(x, vectors):
        dictionary = F.normalize(vectors, dim=1)
        codes = matching_pursuit(x, dictionary, 3)
        return codes.values, sparse_decode(codes.values, codes.indices, dictionary)

    assert torch.autograd.gradcheck(reconstruct, (x, vectors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_unit_atoms_that_were_rounded_pass(dtype):
    atoms = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(6)), dim=1).to(dtype)
    assert matching_pursuit(torch.ones(2, 8, dtype=dtype), atoms, 2).values.dtype == dtype
    with pytest.raises(ConfigError, match=r"expected unit norm"):
        matching_pursuit(torch.ones(2, 8, dtype=dtype), 0.97 * atoms, 2)


def test_what_is_not_finite_is_told():
    with pytest.raises(ConfigError, match=r"^x: got NaN or infinity"):
        matching_pursuit(torch.full((1, 2), torch.nan), torch.eye(2), 1)
    with pytest.raises(NonFiniteError, match=r"^dictionary: got NaN or infinity"):
        matching_pursuit(torch.ones(1, 2), torch.eye(2) * torch.nan, 1)


def test_bad_dictionaries_are_refused():
    with pytest.raises(ConfigError, match=r"dictionary: got atoms of norm 2 to 2, expected unit norm"):
        matching_pursuit(torch.ones(1, 2), 2 * torch.eye(2), 1)
    with pytest.raises(ConfigError, match=r"x, dictionary: got shapes"):
        matching_pursuit(torch.ones(1, 3), torch.eye(2), 1)
    with pytest.raises(ConfigError, match=r"k: got 0"):
        matching_pursuit(torch.ones(1, 2), torch.eye(2), 0)
