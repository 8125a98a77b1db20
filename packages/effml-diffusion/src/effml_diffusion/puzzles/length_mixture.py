"""Texts of one symbol and random length: the smallest task on which a model of variable length can be wrong.

Tokens carry no information, so what a FlexMDM should expect to be missing is known: with a the share of tokens that
have appeared, a text of n shows k with probability C(n, k) a^k (1 - a)^(n - k), and Bayes gives n from k.

Source: arXiv 2509.01025 for the model; the task and its law, derived here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor

__all__ = ["LengthMixture"]


@dataclass(frozen=True)
class LengthMixture:
    """A source for `SampleStream`: `input_ids` (rows, longest), the symbol 0 and pads, and `lengths` (rows,).

    Attributes:
        lengths: probability of each length.

    >>> round(LengthMixture().expected_missing(torch.tensor([2]), torch.tensor([0.25])).item(), 6)
    11.164186
    """

    lengths: Mapping[int, float] = field(default_factory=lambda: {4: 0.1, 16: 0.4, 32: 0.4, 64: 0.1})

    symbol, mask_id, pad_id, vocab_size = 0, 1, 2, 3

    def __post_init__(self) -> None:
        for length in self.lengths:
            check_count("lengths", length, 0)
        if not abs(sum(self.lengths.values()) - 1) < 1e-9 or min(self.lengths.values()) < 0:
            raise ConfigError(f"lengths: got {dict(self.lengths)}, expected probabilities that sum to 1")

    @property
    def fingerprint(self) -> str:
        return f"lengths {sorted(self.lengths.items())}"

    @property
    def draws(self) -> int:
        return 1

    def batch(self, numbers: Tensor) -> dict[str, Tensor]:
        sizes, probs = self._law
        choice = torch.searchsorted(probs.cumsum(0), numbers[:, 0].double() / 2**63, right=True)
        lengths = sizes[choice.clamp(max=len(sizes) - 1)]
        ids = torch.full((len(lengths), int(sizes.max())), self.symbol)
        ids[torch.arange(ids.shape[1]) >= lengths[:, None]] = self.pad_id
        return {"input_ids": ids, "lengths": lengths}

    def expected_missing(self, present: Tensor, alpha: Tensor) -> Tensor:
        """Return E[n - k] (any,), float64, where k tokens (any,) are present and a share alpha (any,) has appeared.

        What one of the k + 1 gaps should expect is that divided by k + 1. NaN where no length is possible.
        """
        sizes, probs = self._law
        n, k = sizes.double(), present.double()[..., None]
        a = alpha.double()[..., None]
        ways = (n + 1).lgamma() - (k + 1).lgamma() - ((n - k).clamp(min=0) + 1).lgamma()
        log = probs.log() + ways + torch.xlogy(k, a) + torch.xlogy((n - k).clamp(min=0), 1 - a)
        weight = torch.where(n >= k, log, -torch.inf).softmax(-1)
        return (weight * (n - k).clamp(min=0)).sum(-1)

    @property
    def _law(self) -> tuple[Tensor, Tensor]:
        sizes = sorted(self.lengths)
        return torch.tensor(sizes), torch.tensor([self.lengths[size] for size in sizes], dtype=torch.float64)
