from __future__ import annotations

import math

import pytest
import torch
from effml_diffusion.flex.insertion_loss import expected_gaps, insertion_nll, phi


@pytest.mark.parametrize(
    ("n", "g", "value"), [(0, 0.5, 0.5), (2, 1.0, 0.386294), (3, 1.5, 0.579442), (1, 0.25, 0.636294)]
)
def test_values(n: int, g: float, value: float) -> None:
    assert phi(torch.tensor(n), torch.tensor(g, dtype=torch.float64)).item() == pytest.approx(value, abs=5e-7)


def gradient(n: int, g: float) -> float:
    guess = torch.tensor(g, dtype=torch.float64, requires_grad=True)
    value = phi(torch.tensor(n), guess)
    assert value.isfinite()
    value.backward()
    assert guess.grad is not None
    return guess.grad.item()


def test_gradients() -> None:
    assert gradient(3, 1.5) == -1.0
    assert gradient(0, 1e-12) == 1.0
    assert gradient(0, 0.0) == 1.0


def test_phi_is_a_divergence_and_its_mean_is_least_at_the_mean() -> None:
    n = torch.arange(6)
    g = torch.linspace(0.01, 6, 600, dtype=torch.float64)
    table = phi(n[:, None], g.expand(6, -1))
    assert bool((table >= 0).all())
    assert phi(n, n.double()).abs().max() == 0  # at n = g = 0 too
    chance = torch.tensor([0.1, 0.3, 0.2, 0.1, 0.1, 0.2], dtype=torch.float64)
    best = g[(chance @ table).argmin()]
    assert best.item() == pytest.approx(float(chance @ n.double()), abs=0.01)


def test_the_two_costs_differ_by_a_constant() -> None:
    n, g = torch.tensor([0, 1, 2, 5]), torch.tensor([0.3, 2.0, 0.1, 5.0], dtype=torch.float64)
    constant = torch.special.xlogy(n, n)
    torch.testing.assert_close(phi(n, g) - insertion_nll(n, g), constant.double())


def test_a_count_that_underflows_keeps_its_gradient_through_the_logarithm() -> None:
    pre = torch.tensor([-200.0, -200.0], requires_grad=True)  # g = exp(pre) is 0 in float32
    n = torch.tensor([3, 0])
    value = phi(n, pre.exp(), pre)
    assert value.isfinite().all()
    value.sum().backward()
    assert pre.grad is not None
    assert pre.grad.tolist() == [-3.0, 0.0]  # up with it, where something is missing
    assert math.isinf(phi(torch.tensor(3), torch.tensor(0.0)).item())


def test_a_distribution_has_its_mean_and_the_logarithm_of_it() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64).log()
    g, log_g = expected_gaps(logits)
    assert g.tolist() == pytest.approx([0.75, 0.0])
    assert log_g.tolist() == pytest.approx([math.log(0.75), -math.inf])
    tiny = torch.tensor([0.0, -500.0])
    assert expected_gaps(tiny)[1].item() == pytest.approx(-500.0)
