"""Norms whose gain and bias are encoded: a gain that clusters within a block loses its variation, and may saturate.

    y = r(norm(r(x)) * q(gain) + q(bias)),   q: `norm_affine`, blocks along the features; r: the scheme's `vector`

Gradients of gain and bias pass straight through q; the gradient of x meets the encoded gain. Any norm qualifies whose
parameters are `weight` and perhaps `bias`: during its forward pass these names lead to the encoded values, whatever
code, fused kernels included, reads them. A norm that multiplies by 1 + weight has its weight encoded, not the sum.

In the code of arXiv 2506.20752 norms are only rounded to bfloat16 (`norm_affine="bfloat16"` here), although the paper
speaks of quantised gains; which of the two its runs used could not be found out. Cost: one cast of the gain.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from effml_shared import layers
from torch import Tensor, nn

from effml_quant.casting import fake_quantize
from effml_quant.precision.operations import rounded
from effml_quant.precision.scheme import PrecisionScheme

__all__ = ["MXNorm", "has_gain", "is_norm"]

_KINDS = (nn.LayerNorm, nn.RMSNorm, layers.RMSNorm)


def is_norm(module: nn.Module) -> bool:
    """Say whether a module is a layer or RMS norm: PyTorch's, effml's, or by its class's name, as in transformers."""
    return isinstance(module, _KINDS) or type(module).__name__.endswith(("RMSNorm", "LayerNorm", "RmsNorm"))


def has_gain(module: nn.Module) -> bool:
    """Say whether a norm has anything to encode."""
    return any(p is not None for p in module._parameters.values())


class MXNorm(nn.Module):
    """What a norm's class is given in front: its own forward pass, on encoded parameters.

    Attributes:
        precision_scheme: None, or one whose `norm_affine` is None: exactly the norm it was.
    """

    precision_scheme: PrecisionScheme | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        scheme = self.precision_scheme
        if scheme is None or scheme.norm_affine is None or not has_gain(self):
            return super().forward(*args, **kwargs)
        if args:
            args = (rounded(args[0], scheme, "vector"), *args[1:])
        with self._encoded(scheme):
            out = super().forward(*args, **kwargs)
        return rounded(out, scheme, "vector") if isinstance(out, Tensor) else out

    @contextmanager
    def _encoded(self, scheme: PrecisionScheme) -> Iterator[None]:
        """Let the names of gain and bias lead to their encoded values for a while."""
        q = scheme.quantizer("norm_affine")
        own = {name: p for name, p in self._parameters.items() if p is not None}
        try:
            for name, parameter in own.items():
                self._parameters[name] = parameter if q is None else fake_quantize(parameter, q)  # type: ignore
            yield
        finally:
            self._parameters.update(own)
