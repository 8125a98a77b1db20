"""How the lengths of generated texts differ from those of reference texts: divergences of two histograms.

KL and total variation are of binned lengths; the Wasserstein distance, of the lengths themselves, is the mean number of
tokens that texts would have to be lengthened or shortened by. Only KL is smoothed, by half a text in every bin that
either side occupies, without which one unseen length would make it infinite.

Cost: O(texts log texts).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor

__all__ = ["LengthStatistics", "length_statistics"]


@dataclass(frozen=True)
class LengthStatistics:
    """Lengths in tokens; standard deviations are of the samples (n - 1)."""

    kl: float  # KL(reference || generated) in nats, smoothed
    tv: float  # total variation distance, in [0, 1]
    wasserstein: float  # first Wasserstein distance, tokens
    mean: float
    std: float
    reference_mean: float
    reference_std: float


def length_statistics(
    generated: Tensor | Sequence[int], reference: Tensor | Sequence[int], *, bin_width: int = 1
) -> LengthStatistics:
    """Compare the lengths of generated texts with those of reference texts, both (texts,), of any two numbers.

    Bins of `bin_width` tokens start at length 0.

    Raises:
        ConfigError: there is no text on one side, or a length is negative.

    >>> length_statistics([1, 1, 3], [1, 3, 3]).tv
    0.3333333333333333
    """
    check_count("bin_width", bin_width, 1)
    ours, theirs = _lengths("generated", generated), _lengths("reference", reference)
    bins, which = torch.unique(torch.cat([ours, theirs]) // bin_width, return_inverse=True)
    counts = torch.stack([torch.bincount(part, minlength=len(bins)) for part in which.split([len(ours), len(theirs)])])
    q, p = counts / counts.sum(1, keepdim=True, dtype=torch.float64)
    smooth = counts + 0.5
    smooth_q, smooth_p = smooth / smooth.sum(1, keepdim=True, dtype=torch.float64)
    return LengthStatistics(
        kl=float((smooth_p * (smooth_p / smooth_q).log()).sum()),
        tv=float((p - q).abs().sum() / 2),
        wasserstein=_wasserstein(ours, theirs),
        mean=float(ours.double().mean()),
        std=float(ours.double().std()) if len(ours) > 1 else 0.0,
        reference_mean=float(theirs.double().mean()),
        reference_std=float(theirs.double().std()) if len(theirs) > 1 else 0.0,
    )


def _wasserstein(ours: Tensor, theirs: Tensor) -> float:
    """Integrate the distance between the two cumulative distributions, which are steps at the lengths that occur."""
    lengths = torch.unique(torch.cat([ours, theirs]))
    shares = [torch.searchsorted(x.sort().values, lengths, right=True).double() / len(x) for x in (ours, theirs)]
    return float(((shares[0] - shares[1]).abs()[:-1] * lengths.diff()).sum())


def _lengths(name: str, values: Tensor | Sequence[int]) -> Tensor:
    lengths = torch.as_tensor(values).detach().cpu()
    if lengths.ndim != 1 or not len(lengths) or lengths.is_floating_point() or (lengths < 0).any():
        raise ConfigError(
            f"{name}: got {tuple(lengths.shape)} {lengths.dtype}, expected one or more whole numbers >= 0"
        )
    return lengths.long()
