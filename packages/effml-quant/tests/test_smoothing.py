"""The expectation by enumeration: exact identities, exact gradients, and agreement with draws."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from effml_quant import Quantizer
from effml_quant.lotion.penalty import lotion_penalty
from effml_quant.lotion.smoothing import smoothed_loss_exact, smoothed_loss_mc
from effml_quant.lotion.variance import cast, neighbours, randomized_round, rr_variance
from effml_shared.errors import ConfigError
from torch import Tensor

INT4 = Quantizer("int4", granularity="tensor")
QUANTIZERS = [
    INT4,
    Quantizer("fp4"),
    Quantizer("int3", granularity="channel"),
    Quantizer("mxfp4", scale="continuous"),
    Quantizer("mxfp6_e2m3", scale_rule="rceil"),
]


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


W1, W2 = vector(0.70, -0.25, 0.15, 0.40).view(2, 2), vector(0.35, -0.14).view(1, 2)
TARGET, COVARIANCE = vector(1, -1).view(1, 2), vector(1, 0.5).diag()


def two_layers(w: Mapping[str, Tensor]) -> Tensor:
    error = w["w2"] @ w["w1"] - TARGET
    return 0.5 * (error @ COVARIANCE @ error.mT).diagonal(dim1=-2, dim2=-1).sum(-1)


def test_two_linear_layers_exactly() -> None:
    """Loss, Gauss-Newton penalty and the one cross term add up to the enumeration."""
    w = {"w1": W1, "w2": W2}
    s1, s2 = rr_variance(W1, INT4), rr_variance(W2, INT4)
    g1 = torch.outer((W2.mT @ W2).diagonal(), COVARIANCE.diagonal())
    g2 = (W1 @ COVARIANCE @ W1.mT).diagonal()[None]
    penalty = lotion_penalty(W1, g1, INT4) + lotion_penalty(W2, g2, INT4)
    cross = 0.5 * torch.einsum("oa,i,ai->", s2, COVARIANCE.diagonal(), s1)
    assert float(two_layers(w)) == pytest.approx(0.4844860625, rel=1e-12)
    assert float(penalty) == pytest.approx(1.215625e-4, rel=1e-10)
    assert float(cross) == pytest.approx(5e-7, rel=1e-10)
    smoothed = float(smoothed_loss_exact(two_layers, w, INT4))
    assert smoothed == pytest.approx(0.484608125, rel=1e-12)
    assert smoothed == pytest.approx(float(two_layers(w) + penalty + cross), rel=1e-12)
    low1, high1 = neighbours(W1, INT4)
    low2, high2 = neighbours(W2, INT4)
    least = min(
        float(two_layers({"w1": torch.where(a, high1, low1), "w2": torch.where(b, high2, low2)}))
        for a in ((torch.arange(16)[:, None] >> torch.arange(4)) & 1 == 1).view(16, 2, 2)
        for b in ((torch.arange(4)[:, None] >> torch.arange(2)) & 1 == 1).view(4, 1, 2)
    )
    assert least == pytest.approx(0.47075625, rel=1e-12)
    assert least < smoothed


@pytest.mark.parametrize("q", QUANTIZERS)
def test_a_quadratics_smoothed_loss_and_gradient_are_those_of_the_penalty(q: Quantizer) -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(2, 5, generator=generator, dtype=torch.float64).requires_grad_()
    half = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    hessian = half @ half.mT

    def loss(x: Tensor) -> Tensor:
        return 0.5 * x.flatten() @ hessian @ x.flatten() + x.sum()

    smoothed = smoothed_loss_exact(loss, w, q)
    expected = loss(w) + lotion_penalty(w, hessian.diagonal().view(2, 5), q)
    torch.testing.assert_close(smoothed, expected, rtol=1e-12, atol=0)
    (found,), (wanted,) = torch.autograd.grad(smoothed, w), torch.autograd.grad(expected, w)
    # On the grid is a kink, but for the largest weight under a scale that follows it.
    smooth = (rr_variance(w, q) > 0) | (q.scale_kind == "float32")
    torch.testing.assert_close(found[smooth], wanted[smooth], rtol=1e-9, atol=1e-12)
    mean, error = smoothed_loss_mc(loss, w.detach(), q, 400, torch.Generator().manual_seed(1))
    assert abs(mean - expected.item()) < 4 * error


def test_gradient_at_fixed_scale_is_a_difference_over_the_cell() -> None:
    w = vector(0.70, -0.33, 0.05, -0.21, 0.44).requires_grad_()
    optimum, h = vector(0.5, -0.3, 0.1, -0.2, 0.4), vector(1, 2, 3, 4, 5)

    def loss(x: Tensor) -> Tensor:
        return 0.5 * (h * (x - optimum).square()).sum()

    (gradient,) = torch.autograd.grad(smoothed_loss_exact(loss, w, INT4, through_scale=False), w)
    expected = vector(0.25, -0.10, -0.15, -0.20, 0.25)
    torch.testing.assert_close(gradient[1:], expected[1:], rtol=1e-9, atol=1e-12)
    ends = neighbours(w.detach(), INT4)
    ends[1][0] += 0.1  # the largest has a neighbour on one side only
    cells = [
        [loss(w.detach().index_fill(0, torch.tensor(i), float(end[i]))) for end in ends] for i in range(len(expected))
    ]
    torch.testing.assert_close(
        torch.tensor(cells, dtype=torch.float64).diff().flatten() / 0.1, expected, rtol=1e-9, atol=1e-12
    )
    (plain,) = torch.autograd.grad(loss(w), w)
    torch.testing.assert_close(plain, vector(0.20, -0.06, -0.15, -0.04, 0.20), rtol=1e-9, atol=1e-12)
    copies = w.detach().expand(40_000, 5).clone().requires_grad_()
    drawn = randomized_round(copies, Quantizer("int4", granularity="channel"), torch.Generator().manual_seed(0))
    (h * (drawn - optimum).square() / 2).sum().backward()  # straight through: no part of the penalty
    torch.testing.assert_close(copies.grad.mean(0), plain, rtol=0, atol=4 * 5 * 0.05 / 200)


def test_the_minimum_is_that_of_the_grid() -> None:
    w = vector(0.70, -0.33, 0.05, -0.21, 0.44)
    loss = lambda x: (x - 0.31).square().sum().sqrt()  # noqa: E731  not quadratic
    on_grid = cast(w, INT4)
    torch.testing.assert_close(smoothed_loss_exact(loss, on_grid, INT4), loss(on_grid), rtol=1e-6, atol=0)
    assert float(smoothed_loss_exact(loss, w, INT4)) > float(loss(w))


def test_continuous_in_the_weights() -> None:
    """Also where another weight becomes the largest, for a loss that is no quadratic."""
    start, end = vector(0.7, -0.3, 0.2), vector(0.5, 0.9, -0.1)
    t = torch.linspace(0, 1, 401, dtype=torch.float64)[:, None]
    loss = lambda x: (3 * x).sin().sum() + x.prod()  # noqa: E731
    found = torch.stack([smoothed_loss_exact(loss, start * (1 - a) + end * a, INT4) for a in t])
    assert float(found.diff().abs().max()) < 0.05


def test_bad_arguments() -> None:
    w = torch.randn(30, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match=r"params: got 29 weights off the grid, expected at most 20"):
        smoothed_loss_exact(torch.sum, w, INT4)
    with pytest.raises(ConfigError, match=r"n: got 1"):
        smoothed_loss_mc(torch.sum, w, INT4, 1)
