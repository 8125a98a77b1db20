"""Archetypal dictionary: the constraints hold after any step."""

import pytest
import torch
from effml_eval.sae.archetypal import ArchetypalDictionary
from effml_shared.errors import ConfigError
from scipy.optimize import linprog


def points(count=6, dim=4):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_starts_at_the_points_in_turn():
    y = points()
    assert torch.equal(ArchetypalDictionary(y, 9)(), y[torch.arange(9) % 6])


@pytest.mark.parametrize("delta", [0.0, 0.3, 1.0])
def test_constraints_hold_after_steps(delta):
    dictionary = ArchetypalDictionary(points(), 8, delta=delta)
    optimizer = torch.optim.SGD(dictionary.parameters(), lr=0.5)
    target = torch.randn(8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(10):
        optimizer.zero_grad()
        (dictionary() - target).square().sum().backward()
        optimizer.step()
        dictionary.project_()
        assert bool((dictionary.weights >= 0).all())
        torch.testing.assert_close(dictionary.weights.sum(1), torch.ones(8, dtype=torch.float64))
        assert float(dictionary.relaxation.detach().norm(dim=1).max()) <= delta * (1 + 1e-6)
    assert torch.isfinite(dictionary()).all()
    assert float(dictionary.log_scale.detach()) != 0


def test_without_relaxation_atoms_stay_in_the_hull():
    dictionary = ArchetypalDictionary(points(), 5, delta=0.0)
    with torch.no_grad():
        dictionary.weights.copy_(torch.randn(5, 6, generator=torch.Generator().manual_seed(2)))
        dictionary.relaxation.fill_(0.1)
        dictionary.project_()
    one = torch.ones(1, dtype=torch.float64)
    for atom in dictionary().detach():  # convex weights as a feasible point: non-negative, of sum 1
        system = torch.cat([points().T, one.expand(1, 6)])
        assert linprog(torch.zeros(6).numpy(), A_eq=system.numpy(), b_eq=torch.cat([atom, one]).numpy()).success


def test_a_row_without_positive_entries_becomes_one_hot():
    dictionary = ArchetypalDictionary(points(), 2)
    with torch.no_grad():
        dictionary.weights.copy_(torch.tensor([[-3.0, -1.0, -2.0, -4.0, -5.0, -6.0], [0.0] * 6]))
    dictionary.project_()
    assert dictionary.weights.tolist() == [[0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]]


def test_bad_arguments_are_refused():
    for bad in (torch.zeros(3), torch.zeros(0, 2), torch.full((2, 2), torch.nan)):
        with pytest.raises(ConfigError, match=r"points: got"):
            ArchetypalDictionary(bad, 2)
    with pytest.raises(ConfigError, match=r"delta: got -1"):
        ArchetypalDictionary(points(), 2, delta=-1)
    with pytest.raises(ConfigError, match=r"n_concepts: got 0"):
        ArchetypalDictionary(points(), 0)
