"""LSQ: the step of the grid is learned together with the weights.

    v = w / s;   q = s round(clip(v, -Qn, Qp));   dq/dw = 1 inside the range, 0 outside;
    dq/ds = round(v) - v inside, -Qn or Qp outside, times 1 / sqrt(n Qp),   n weights sharing s

State: one step per tensor or output channel, a parameter `weight_step` of the module that an optimizer must know; Adam
moves it by its learning rate whatever its gradient's size, so give steps a rate in proportion to their own size.
Cost: one cast per forward pass and five elementwise operations. Source: arXiv 1902.08153, equations 1 to 3 and
section 2.2; for formats other than integers the same gradients hold on their grid (not from the paper).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from effml_shared.errors import ConfigError
from effml_shared.tensors import widen
from torch import Tensor, nn

from effml_quant.blocks import Blocks
from effml_quant.qat.export import with_scales
from effml_quant.qat.fixed_scale import cast_rows, check_fixable, unit_maximum
from effml_quant.qat.straight_through import PTQ
from effml_quant.qtensor import QTensor
from effml_quant.quantizer import Quantizer

__all__ = ["LSQ", "lsq_quantize"]


class LSQ(PTQ):
    """Learned step size quantisation. What is deployed has the learned step, not one from the largest weight.

    Args:
        quantizer: of granularity `"tensor"` or `"channel"`. Integers with recipe `"torchao"` have the paper's range
            Qn = 2^(b-1); the others the symmetric one that every baseline here uses.

    Raises:
        ConfigError: the granularity is another, or the format has no scale.
    """

    def __init__(self, quantizer: str | Quantizer) -> None:
        super().__init__(quantizer)
        check_fixable(self.quantizer)
        if self.quantizer.block not in ("tensor", "channel"):
            raise ConfigError(f"granularity: got {self.quantizer.block!r}, expected 'tensor' or 'channel' with LSQ")

    def prepare(self, weight: nn.Parameter) -> Mapping[str, nn.Parameter]:
        """Return the initial steps, 2 mean |w| / sqrt(Qp); 1 where all weights are zero."""
        rows = widen(weight.detach()).reshape(self._blocks(weight), -1)
        step = 2 * rows.abs().mean(1) / self.quantizer.format.max**0.5
        return {"weight_step": nn.Parameter(torch.where(step > 0, step, 1.0), requires_grad=weight.requires_grad)}

    def forward_weight(self, module: nn.Module, weight: nn.Parameter) -> Tensor:
        """Return the weight on the grid of the learned step."""
        rows = weight.reshape(self._blocks(weight), -1)
        return lsq_quantize(rows, module.weight_step, self.quantizer).reshape(weight.shape)  # type: ignore[arg-type]

    def deployed_weight(self, module: nn.Module, weight: nn.Parameter) -> Tensor:
        """Return the weight on the grid of the learned step."""
        return self.forward_weight(module, weight)

    def quantized_weight(self, module: nn.Module, weight: nn.Parameter) -> QTensor:
        """Return the codes under the learned step."""
        quantizer = self.quantizer.replace(scale="continuous")
        steps = module.weight_step.detach().abs()  # type: ignore[operator]
        shape = Blocks.cut(tuple(weight.shape), quantizer.axis, quantizer.block).scales
        return with_scales(weight.detach(), steps.reshape(shape), quantizer)

    def _blocks(self, weight: Tensor) -> int:
        return weight.shape[0] if self.quantizer.block == "channel" and weight.ndim else 1


def lsq_quantize(w: Tensor, step: Tensor, quantizer: Quantizer) -> Tensor:
    """Quantise rows with learned steps.

    Args:
        w: (rows, n).
        step: (rows,), float32 or wider. Its magnitude counts, so that an optimizer's overshoot past zero is harmless.
        quantizer: its format and, for integers, its recipe; the scale is `step` times the format's values.
    """
    high = quantizer.format.max
    low = high + quantizer.format.spacing if quantizer.recipe == "torchao" else high
    share = (w.shape[1] * high) ** -0.5
    s = step.abs().clamp(min=torch.finfo(step.dtype).tiny)[:, None]
    s = s.detach() + (s - s.detach()) * share  # the value is s, the gradient a share of its own
    v = widen(w) / s
    unit = torch.full_like(v[:, :1], unit_maximum(quantizer))  # makes the cast's own scale 1
    codes = cast_rows(v.detach(), unit, quantizer.replace(scale="continuous"))
    inside = (v > -low) & (v < high)
    return (s * (codes + torch.where(inside, v - v.detach(), 0.0))).to(w.dtype)
