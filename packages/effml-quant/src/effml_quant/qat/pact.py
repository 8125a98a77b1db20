"""PACT: activations clipped at a learned bound and cast to an unsigned grid up to it.

    y = clip(x, 0, a);   q = (a / (2^b - 1)) round((2^b - 1) y / a);   dq/dx = 1 for 0 <= x < a, else 0;
    dq/da = 1 for x >= a, else 0;   penalty = decay a^2

State: the bound a. Cost: one cast of the activations. Source: arXiv 1805.06085, section 3.
"""

from __future__ import annotations

import torch
from effml_shared.checks import check_range
from effml_shared.errors import ConfigError
from torch import Tensor, nn

from effml_quant.casting import fake_quantize
from effml_quant.quantizer import Quantizer

__all__ = ["PACT"]


class PACT(nn.Module):
    """An activation function in place of a ReLU.

    Args:
        bits: of a code, 2 to 8.
        alpha: the bound at the start.
        decay: weight of the bound's squared size in `penalty()`, which is yours to add to the loss.

    Raises:
        ConfigError: an argument is out of range.

    >>> PACT(bits=2, alpha=3.0)(torch.tensor([-1.0, 0.4, 1.6, 7.0])).tolist()
    [0.0, 0.0, 2.0, 3.0]
    """

    def __init__(self, bits: int = 4, alpha: float = 10.0, decay: float = 1e-4) -> None:
        super().__init__()
        if bits not in range(2, 9):
            raise ConfigError(f"bits: got {bits}, expected 2 to 8")
        if not 0 < alpha < float("inf"):
            raise ConfigError(f"alpha: got {alpha}, expected a positive number")
        check_range("decay", decay, 0.0)
        self.bits, self.decay = bits, decay
        self.quantizer = Quantizer(f"int{bits}", granularity="tensor", recipe="asymmetric")  # zero point 0: unsigned
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def forward(self, x: Tensor) -> Tensor:
        """Clip and cast x, any shape; returns its dtype."""
        alpha = self.alpha.abs().to(x.dtype)
        y = torch.where(x >= alpha, alpha, torch.where(x < 0, torch.zeros_like(x), x))
        anchored = torch.cat([y.flatten(), alpha.detach().reshape(1)])  # the scale is the bound's, reached or not
        return fake_quantize(anchored, self.quantizer)[:-1].reshape(x.shape)

    def penalty(self) -> Tensor:
        """Return decay a^2, a scalar."""
        return self.decay * self.alpha.square()

    def extra_repr(self) -> str:
        """Return what `print` shows."""
        return f"bits={self.bits}, alpha={self.alpha.item():.3g}"
