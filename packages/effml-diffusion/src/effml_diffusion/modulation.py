"""Telling a network one number per text, such as the time: sinusoids, a small MLP, and adaptive layer norms (adaLN).

    sinusoids   (cos(x f_k), sin(x f_k)), f_k = 10000^(-k / 128), k = 0 .. 127
    embedding   W_b silu(W_a sinusoids(x) + b_a) + b_b                        (batch, cond_dim)
    adaLN       norm(h) (1 + scale) + shift, shift and scale linear in the embedding and zero at the start

Numbers in [0, 1] move few of the sinusoids: 1000 times as large, they are what image models are told. Cost: O(1) per
text, and per modulated tensor one read and one write that a compiler fuses into the norm.

Source: arXiv 2212.09748 (adaLN-zero), in the form of the text models of arXiv 2310.16834 and 2406.07524.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from effml_shared.tensors import widen
from torch import Tensor, nn

__all__ = ["ScalarEmbedding", "ZeroLinear", "modulate", "sinusoids"]

WAVES = 256  # sinusoids, cosines and sines together


def sinusoids(x: Tensor, n: int = WAVES) -> Tensor:
    """Return n / 2 cosines and then n / 2 sines of x (batch,), of angular frequencies from 1 down to almost 1e-4.

    >>> sinusoids(torch.tensor([0.5]), 4)
    tensor([[0.8776, 1.0000, 0.4794, 0.0050]])
    """
    frequencies = 10_000 ** (-torch.arange(n // 2, dtype=x.dtype, device=x.device) / (n // 2))
    angles = x[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class ZeroLinear(nn.Linear):
    """A linear layer that starts as the zero function."""

    def reset_parameters(self) -> None:
        """Set weight and bias to zero."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class ScalarEmbedding(nn.Module):
    """Embed numbers x (batch,) as (batch, cond_dim); angles are computed in float32 or wider."""

    def __init__(self, cond_dim: int, *, zero: bool = False) -> None:
        """zero: start as the zero function, so that this number can be added to a network's inputs later."""
        super().__init__()
        self.hidden = nn.Linear(WAVES, cond_dim)
        self.output = (ZeroLinear if zero else nn.Linear)(cond_dim, cond_dim)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.hidden.weight
        waves = sinusoids(x.to(widen(weight[:0]).dtype)).to(weight.dtype)
        return self.output(F.silu(self.hidden(waves)))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (1 + scale) + shift: x (batch, seq, channels), shift and scale (batch, channels)."""
    return x * (1 + scale[:, None]) + shift[:, None]
