"""JumpReLU `z = p * H(p - theta)` and its L0 count `H(p - theta)`, with pseudo-gradients for the thresholds.

Neither has a useful derivative in theta: sampled, both are piecewise constant. Their expectations have one, and a
kernel K of bandwidth eps estimates it from the samples that fall near the threshold (arXiv 2407.14435, section 3):

    dz/dtheta = -(theta / eps) K((p - theta) / eps)        dz/dp = H(p - theta)
    dH/dtheta =     -(1 / eps) K((p - theta) / eps)        dH/dp = 0

Every kernel here integrates to 1, so that for densely spread p the means tend to -theta and -1 times the density of p
at theta. State: none. Cost: a few operations per pre-activation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from effml_shared.checks import check_choice
from effml_shared.errors import ConfigError
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["KERNELS", "active", "jumprelu"]

KERNELS: dict[str, Callable[[Tensor], Tensor]] = {
    "rectangle": lambda u: (u.abs() < 0.5).to(u.dtype),
    "triangle": lambda u: (1 - u.abs()).relu(),
    "epanechnikov": lambda u: 0.75 * (1 - u.square()).relu(),
    "cosine": lambda u: torch.where(u.abs() < 1, math.pi / 4 * torch.cos(math.pi / 2 * u), 0.0),
    "gaussian": lambda u: torch.exp(-0.5 * u.square()) / math.sqrt(2 * math.pi),
    "logistic": lambda u: torch.sigmoid(u) * torch.sigmoid(-u),
    "silverman": lambda u: 0.5 * torch.exp(-u.abs() / math.sqrt(2)) * torch.sin(u.abs() / math.sqrt(2) + math.pi / 4),
    "cauchy": lambda u: 1 / (math.pi * (1 + u.square())),
}
"""Kernels of a bandwidth's units; each integrates to 1 over the line."""


def jumprelu(p: Tensor, theta: Tensor, bandwidth: float = 1e-3, kernel: str = "rectangle") -> Tensor:
    """Return p where it is above its threshold, 0 elsewhere.

    Args:
        p: pre-activations (..., C).
        theta: thresholds (C,) or one for all, >= 0.
        bandwidth: eps, in units of p.
        kernel: a name in `KERNELS`.

    Raises:
        ConfigError: the kernel is unknown or the bandwidth not positive.

    >>> jumprelu(torch.tensor([0.4, 0.5, 0.6]), torch.tensor(0.5))
    tensor([0.0000, 0.0000, 0.6000])
    """
    _check(bandwidth, kernel)
    return _Jump.apply(p, theta, bandwidth, kernel, True)


def active(p: Tensor, theta: Tensor, bandwidth: float = 1e-3, kernel: str = "rectangle") -> Tensor:
    """Return 1 where p is above its threshold, 0 elsewhere; arguments as for `jumprelu`."""
    _check(bandwidth, kernel)
    return _Jump.apply(p, theta, bandwidth, kernel, False)


def _check(bandwidth: float, kernel: str) -> None:
    check_choice("kernel", kernel, KERNELS)
    if not 0 < bandwidth < math.inf:
        raise ConfigError(f"bandwidth: got {bandwidth}, expected a number > 0")


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, theta: Tensor, bandwidth: float, kernel: str, scaled: bool) -> Tensor:
        ctx.save_for_backward(p, theta)
        ctx.bandwidth, ctx.kernel, ctx.scaled = bandwidth, kernel, scaled
        if not scaled:
            return (p > theta).to(p.dtype)
        return torch.where(p <= theta, 0.0, p)  # NaN stays and shows, where it would count as inactive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        p, theta = ctx.saved_tensors
        d_p = g * (p > theta) if ctx.scaled else None
        d_theta = None
        if ctx.needs_input_grad[1]:
            density = KERNELS[ctx.kernel]((p - theta) / ctx.bandwidth) / ctx.bandwidth
            d_theta = (-g * density).sum_to_size(theta.shape)
            d_theta = d_theta * theta if ctx.scaled else d_theta
        return d_p, d_theta, None, None, None
