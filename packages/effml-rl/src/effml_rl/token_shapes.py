"""The shapes that all losses over tokens share: (batch, T) under a boolean mask."""

from __future__ import annotations

import torch
from effml_shared.errors import ConfigError
from torch import Tensor

__all__ = ["check_tokens"]


def check_tokens(mask: Tensor, *, per_row: tuple[str, ...] = (), **tensors: Tensor | None) -> None:
    """Raise a `ConfigError` unless mask is a boolean (batch, T) and every tensor that is given has its shape.

    Those named in per_row may be (batch, 1) too. Everything else that broadcasting would accept is refused: rewards or
    advantages (batch,) against (batch, T) are silently wrong where batch = T.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ConfigError(f"mask: got {mask.dtype} of shape {tuple(mask.shape)}, expected torch.bool (batch, T)")
    shape, narrow = tuple(mask.shape), (len(mask), 1)
    for name, tensor in tensors.items():
        if tensor is None or tensor.shape == shape or (name in per_row and tensor.shape == narrow):
            continue
        expected = f"{shape} as the mask has" + (f", or {narrow}" if name in per_row else "")
        raise ConfigError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")
