"""Noise on the weights in place of the penalty: its moments, and its mean gradient for a quadratic."""

from __future__ import annotations

import torch
from effml_quant import Quantizer
from effml_quant.lotion.gaussian import GaussianNoise
from effml_quant.lotion.penalty import lotion_penalty
from effml_quant.lotion.variance import cast, rr_variance
from effml_quant.qat import attach
from torch import nn

ROWS = Quantizer("int4", granularity="channel")


def test_moments_and_mean_gradient() -> None:
    n = 100_000
    row = torch.tensor([0.70, -0.33, 0.05, -0.21, 0.44], dtype=torch.float64)
    h = torch.arange(1.0, 6, dtype=torch.float64)
    w = nn.Parameter(row.repeat(n, 1))
    noisy = GaussianNoise(ROWS, torch.Generator().manual_seed(0), delta=0.0).forward_weight(nn.Linear(1, 1), w)
    variance = rr_variance(row[None], ROWS)[0]
    torch.testing.assert_close(noisy.mean(0), row, rtol=0, atol=1e-3)
    torch.testing.assert_close(noisy.var(0), variance, rtol=0.03, atol=1e-12)
    (gradient,) = torch.autograd.grad((h * noisy.square() / 2).sum(), w)
    one = row.clone().requires_grad_()
    expected = (h * one.square() / 2).sum() + lotion_penalty(one[None], h[None], ROWS)
    (wanted,) = torch.autograd.grad(expected, one)
    assert bool(((gradient.mean(0) - wanted).abs() <= 4 * gradient.std(0) / n**0.5 + 1e-12).all())


def test_in_a_model() -> None:
    layer = nn.Linear(4, 3)
    attached = attach(layer, GaussianNoise(ROWS))
    x = torch.eye(4)
    assert not torch.equal(layer(x), layer(x))
    layer(x).sum().backward()
    assert layer._parameters["weight"].grad.isfinite().all()  # type: ignore[union-attr]
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(attached.deployed()["weight"], cast(layer._parameters["weight"], ROWS).detach())  # type: ignore[arg-type]
    attached.restore()


def test_on_the_grid_nothing_moves_and_nothing_is_nan() -> None:
    w = nn.Parameter(cast(torch.randn(4, 8, dtype=torch.float64), ROWS))
    noisy = GaussianNoise(ROWS).forward_weight(nn.Linear(1, 1), w)
    torch.testing.assert_close(noisy, w)
    (gradient,) = torch.autograd.grad(noisy.sum(), w)
    assert torch.equal(gradient, torch.ones_like(w))
