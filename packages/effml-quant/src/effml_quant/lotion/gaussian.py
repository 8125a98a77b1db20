"""Gaussian smoothing by reparametrisation: the forward pass computes with w + sigma(w) eps, eps ~ N(0, 1).

The noise has the mean and variance of randomised rounding, so for a quadratic loss the mean loss is the same, and a
gradient through sigma is an unbiased, noisy gradient of loss and penalty together; no curvature is needed. On the grid
the derivative of sigma is infinite: sqrt(sigma^2 + delta^2) with delta a small part of a cell stands in for it.

Use it with `effml_quant.qat.attach`. Randomised rounding in the forward pass is `effml_quant.qat.RAT`, and is *not* a
stochastic form of LOTION: its straight-through gradient has no penalty part. State: none. Cost: about 20 element-wise
operations per forward pass. Source: an alternative to arXiv 2510.08757, derived here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effml_quant.lotion.variance import cast, neighbours
from effml_quant.quantizer import Quantizer

__all__ = ["GaussianNoise"]


@dataclass(frozen=True)
class GaussianNoise:
    """Noise of randomised rounding's variance on the weights, while training; in `eval` mode the cast.

    Args:
        quantizer: with a continuous scale.
        generator: of the draws; None: torch's global one.
        delta: least standard deviation, in distances of neighbours.
    """

    quantizer: Quantizer
    generator: torch.Generator | None = None
    delta: float = 0.01

    def prepare(self, weight: nn.Parameter) -> Mapping[str, nn.Parameter]:
        """Learn nothing beside the weight."""
        return {}

    def forward_weight(self, module: nn.Module, weight: nn.Parameter) -> Tensor:
        """Return a draw while training, the deployed weight otherwise."""
        if not module.training:
            return self.deployed_weight(module, weight)
        low, high = neighbours(weight, self.quantizer)
        wide = weight.to(low.dtype)
        floor = (self.delta * (high - low).detach()).square()
        variance = torch.where(low == high, 1.0, (wide - low) * (high - wide) + floor)  # a root of 0 has no derivative
        eps = torch.randn(weight.shape, dtype=low.dtype, device=weight.device, generator=self.generator)
        return (wide + torch.where(low == high, 0.0, variance.sqrt() * eps)).to(weight.dtype)

    def deployed_weight(self, module: nn.Module, weight: nn.Parameter) -> Tensor:
        """Return the weight rounded to its grid."""
        return cast(weight, self.quantizer)
