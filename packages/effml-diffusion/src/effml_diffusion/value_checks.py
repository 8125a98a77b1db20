"""Checks of the values in tensors: only where looking is free, on a CPU and outside compiled code."""

from __future__ import annotations

import torch
from effml_shared.errors import ConfigError
from torch import Tensor

__all__ = ["check_values"]


def check_values(name: str, values: Tensor, holds: Tensor, expected: str) -> None:
    """Raise a `ConfigError` with the first of values for which a condition, of a shape they expand to, fails.

    >>> t = torch.tensor([0.5, 1.5])
    >>> check_values("t", t, t <= 1, "numbers up to 1")
    Traceback (most recent call last):
    ...
    effml_shared.errors.ConfigError: t: got 1.5, expected numbers up to 1
    """
    if holds.device.type == "cpu" and not torch.compiler.is_compiling() and not holds.all():
        raise ConfigError(f"{name}: got {values.expand_as(holds)[~holds][0].item()}, expected {expected}")
