"""JumpReLU: pseudo-gradients against the derivatives of the expectation."""

import pytest
import torch
from effml_eval.sae.jumprelu import KERNELS, active, jumprelu
from effml_shared.errors import ConfigError

P = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000


@pytest.mark.parametrize(("function", "expected"), [(jumprelu, -0.5), (active, -1.0)])
def test_mean_pseudo_gradient_is_the_population_derivative(function, expected):
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    function(P, theta, 0.1).mean().backward()
    assert float(theta.grad) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_integrate_to_one(name):
    u = torch.linspace(-50, 50, 1_000_001, dtype=torch.float64)
    expected = 0.98727 if name == "cauchy" else 1.0
    assert float(torch.trapezoid(KERNELS[name](u), u)) == pytest.approx(
        expected, abs=1e-3 if name != "cauchy" else 1e-5
    )


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_tends_to_the_same_gradient(name):
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    active(P, theta, 0.01, name).mean().backward()
    assert float(theta.grad) == pytest.approx(-1.0, abs=0.02)


def test_values_and_gradients_by_element():
    p = torch.tensor([[0.4, 0.5, 0.6], [-1.0, 0.52, 2.0]], dtype=torch.float64, requires_grad=True)
    theta = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64)
    z = jumprelu(p, theta, 0.1)
    assert z.tolist() == [[0, 0, 0.6], [0, 0.52, 2.0]]
    z.backward(g)
    assert p.grad.tolist() == [[0, 0, 3], [0, 5, 6]]
    torch.testing.assert_close(theta.grad, torch.tensor([0.0, -0.5 * 10 * 7, 0.0], dtype=torch.float64))
    p.grad = theta.grad = None
    counted = active(p, theta, 0.1)
    assert counted.tolist() == [[0, 0, 1], [0, 1, 1]]
    counted.backward(g)
    assert p.grad is None
    assert theta.grad.tolist() == pytest.approx([0, -70, 0])


def test_a_threshold_of_zero_is_relu():
    p = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(jumprelu(p, torch.zeros(5, dtype=torch.float64)), p.relu())
    p.requires_grad_()
    theta = torch.full((5,), 0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda q: jumprelu(q, theta), (p,))  # p is off every threshold


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_arguments_are_refused(bandwidth):
    with pytest.raises(ConfigError, match=r"bandwidth: got"):
        jumprelu(P, torch.tensor(0.5), bandwidth)
    with pytest.raises(ConfigError, match=r"kernel: got 'box'"):
        active(P, torch.tensor(0.5), kernel="box")


def test_nan_shows():
    assert bool(jumprelu(torch.tensor([torch.nan]), torch.tensor(0.5)).isnan().all())
