"""Lengths on request: bend the expected numbers of missing tokens while generating, with the network as it is.

    tilt        g -> g exp(tilt)                                    longer (> 0) or shorter (< 0) texts
    bounds      g -> g scaled so that length + sum g stays in [minimum, maximum]
    target      minimum = maximum: what is missing is known, g says only where

All lengths are those of whole texts, given tokens included. The sampler also holds the bounds, since what is drawn
differs from what is expected: it inserts no more than fits, and at the last insertion adds what is short of the
minimum, so that every length is within the bounds, whatever the number of steps (if any gap is open).

Tilted or bounded, the law of the texts is no longer that of the data, nor exactly the data's given the length: this is
guidance, and our own; nothing of it is in arXiv 2509.01025.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from effml_shared.errors import ConfigError
from torch import Tensor

__all__ = ["LengthGuidance"]


@dataclass(frozen=True, eq=False)
class LengthGuidance:
    """What is wanted of the lengths of generated texts: numbers for all rows, or tensors (batch,).

    Attributes:
        tilt: log of the factor on every expected count.
        minimum: shortest text wanted, None: 0.
        maximum: longest text wanted, None: what the sampler allows.
        target: exactly this length; excludes both bounds.

    Raises:
        ConfigError: a number is out of range, minimum exceeds maximum, or a target comes with bounds.

    >>> LengthGuidance(target=6).bend(torch.tensor([[1.0, 3.0]]), torch.tensor([4]), torch.tensor([[True, True]]))
    tensor([[0.5000, 1.5000]])
    """

    tilt: float = 0.0
    minimum: int | Tensor | None = None
    maximum: int | Tensor | None = None
    target: int | Tensor | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.tilt):
            raise ConfigError(f"tilt: got {self.tilt}, expected a finite number")
        if self.target is not None and (self.minimum is not None or self.maximum is not None):
            raise ConfigError("target: got a minimum or a maximum beside it, expected either")
        for name in ("minimum", "maximum", "target"):
            value = getattr(self, name)
            numbers = torch.as_tensor(0 if value is None else value)
            if numbers.is_floating_point() or numbers.ndim > 1 or (numbers < 0).any():
                raise ConfigError(f"{name}: got {value}, expected a whole number >= 0, or one per row")
        if self.minimum is not None and self.maximum is not None:
            low, high = torch.as_tensor(self.minimum), torch.as_tensor(self.maximum)
            if (low.to(high.device) > high).any():
                raise ConfigError(f"minimum: got {self.minimum}, expected at most the maximum, {self.maximum}")

    @property
    def bounded(self) -> bool:
        """Whether there is more than a tilt."""
        return not (self.minimum is None and self.maximum is None and self.target is None)

    def missing(self, lengths: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
        """Return how many tokens rows of these lengths (batch,) must still get at least and may still get at most."""
        low = self.minimum if self.target is None else self.target
        high = self.maximum if self.target is None else self.target
        floor = _per_row("minimum", 0 if low is None else low, lengths)
        ceiling = _per_row("maximum", max_length if high is None else high, lengths).clamp(max=max_length)
        if (floor > max_length).any():
            raise ConfigError(f"minimum: got {low}, expected at most max_length, {max_length}")
        return (floor - lengths).clamp(min=0), (ceiling - lengths).clamp(min=0)

    def bend(self, gaps: Tensor, lengths: Tensor, open_gaps: Tensor, max_length: int | None = None) -> Tensor:
        """Return the expected counts gaps (batch, seq + 1) of rows of given lengths (batch,) as wanted.

        open_gaps (batch, seq + 1) bool: elsewhere nothing is expected. Where something must come and nothing is
        expected, it is spread evenly.
        """
        gaps = torch.where(open_gaps, gaps * math.exp(self.tilt), 0.0)
        if not self.bounded:
            return gaps
        ceiling = torch.iinfo(lengths.dtype).max if max_length is None else max_length
        low, high = (bound.unsqueeze(1) for bound in self.missing(lengths, ceiling))
        total = gaps.sum(1, keepdim=True)
        wanted = total.clamp(low.to(gaps.dtype), high.to(gaps.dtype))
        even = wanted * open_gaps / open_gaps.sum(1, keepdim=True).clamp(min=1)
        return torch.where(total > 0, gaps * (wanted / total.where(total > 0, 1.0)), even)


def _per_row(name: str, value: int | Tensor, lengths: Tensor) -> Tensor:
    numbers = torch.as_tensor(value, dtype=lengths.dtype, device=lengths.device)
    if numbers.ndim and numbers.shape != lengths.shape:
        raise ConfigError(f"{name}: got {len(numbers)} numbers, expected one for each of {len(lengths)} rows")
    return numbers.expand_as(lengths)
