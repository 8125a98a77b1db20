"""Baselines without parameters of their own: nothing in training, nearest rounding, randomised rounding.

    method    forward pass computes with                  gradient of w     deployed
    PTQ       w                                           dL/dw             cast(w)
    STE       cast(w), scale from w at every step         dL/dq unchanged   cast(w)
    RAT       a fresh draw of randomised rounding of w    dL/dq unchanged   cast(w)

With a scale from the block's largest magnitude nothing saturates, so the straight-through gradient needs no clipping.
State: none. Cost: one cast of the weights per forward pass. Sources: straight-through estimator: arXiv 1308.3432; the
three as baselines of smoothed training: arXiv 2510.08757. RAT is not that method: for a quadratic loss its mean
gradient is the plain gradient at w, with no pull towards the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effml_quant.casting import fake_quantize
from effml_quant.qtensor import QTensor, quantize
from effml_quant.quantizer import Quantizer

__all__ = ["PTQ", "RAT", "STE"]


@dataclass(frozen=True)
class PTQ:
    """Post-training quantisation: train as ever, cast at the end.

    Args:
        quantizer: or the name of a format.
    """

    quantizer: Quantizer

    def __init__(self, quantizer: str | Quantizer) -> None:
        object.__setattr__(self, "quantizer", Quantizer.make(quantizer))

    def prepare(self, weight: nn.Parameter) -> Mapping[str, nn.Parameter]:
        """Learn nothing beside the weight."""
        return {}

    def forward_weight(self, module: nn.Module, weight: nn.Parameter) -> Tensor:
        """Return the weight itself."""
        return weight

    def deployed_weight(self, module: nn.Module, weight: nn.Parameter) -> Tensor:
        """Return the weight rounded to its grid."""
        return fake_quantize(weight, self.quantizer)

    def quantized_weight(self, module: nn.Module, weight: nn.Parameter) -> QTensor:
        """Return the deployed weight as codes and scales."""
        return quantize(weight, self.quantizer)


class STE(PTQ):
    """Quantisation-aware training with a straight-through gradient."""

    def forward_weight(self, module: nn.Module, weight: nn.Parameter) -> Tensor:
        """Return the cast weight, whose gradient the weight gets unchanged."""
        return self.deployed_weight(module, weight)


@dataclass(frozen=True, init=False)
class RAT(PTQ):
    """Training under randomised rounding; in `eval` mode the cast is the deployed one.

    Draws come from torch's global generator of the weight's device: what seeds, checkpoints and replays that one
    (`effml_shared.loop`, activation checkpointing) does so for the draws. A generator of your own is yours to store.

    Args:
        generator: of the draws.
    """

    generator: torch.Generator | None = None

    def __init__(self, quantizer: str | Quantizer, generator: torch.Generator | None = None) -> None:
        super().__init__(quantizer)
        object.__setattr__(self, "generator", generator)

    def forward_weight(self, module: nn.Module, weight: nn.Parameter) -> Tensor:
        """Return a draw while training, the deployed weight otherwise."""
        if not module.training:
            return self.deployed_weight(module, weight)
        return fake_quantize(weight, self.quantizer, generator=self.generator, rounding="stochastic")
