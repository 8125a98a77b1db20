"""Rotate tokens in groups of 16 by a randomised Hadamard matrix, which spreads an outlier over its group.

    each 16 tokens v of a channel  ->  H16 diag(s) v / 4,   H16 orthogonal up to its factor 4, s a fixed vector of signs

Both operands of a product over tokens take the same rotation, so the exact product does not change; what is quantised
in between has fewer outliers. Cost: 16 multiply-adds per element. Source: arXiv 2509.25149, section 4.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["hadamard_rotate"]

GROUP = 16
_SIGNS = (1, -1, -1, 1, 1, 1, -1, 1, -1, -1, -1, 1, -1, 1, 1, -1)  # drawn once: one vector for all layers and steps


def hadamard_rotate(x: Tensor) -> Tensor:
    """Rotate x (..., tokens, channels), float32 or float64, along its tokens, padded with zeros to a multiple of 16."""
    tokens = x.shape[-2]
    x = F.pad(x, (0, 0, 0, -tokens % GROUP))
    groups = x.unflatten(-2, (x.shape[-2] // GROUP, GROUP))
    return (_rotation(x.dtype, x.device) @ groups).flatten(-3, -2)


def _rotation(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return H16 diag(s) / 4: H's entry (i, j) is -1 to the number of ones in i & j."""
    rows = [[sign * (-1) ** bin(i & j).count("1") / 4 for j, sign in enumerate(_SIGNS)] for i in range(GROUP)]
    return torch.tensor(rows, dtype=dtype, device=device)
