"""How varied generated text is, from token ids alone: entropy, distinct n-grams, self-BLEU.

Perplexity under a judge falls with repetition and low temperature alike, so it means little without one of these beside
it. Entropy is that of a sample's own token frequencies, averaged over samples by the caller; papers report it in nats
(MDLM, ReMDM, PRISM) or bits (FlexMDM's script). Samples are rows (batch, seq), `valid` (batch, seq) says which tokens
count; they need not be neighbours for the entropy, and must be for n-grams.

Cost: a sort for entropy and distinct n-grams; self-BLEU one pass over all n-grams, not one per pair of samples.
Sources: arXiv 2406.07524 (entropy), 1510.03055 (distinct-n), 1802.01886 (self-BLEU).
"""

from __future__ import annotations

import bisect
import math
from collections import Counter

import torch
import torch.nn.functional as F
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from torch import Tensor

__all__ = ["distinct_n", "self_bleu", "token_entropy"]


def token_entropy(ids: Tensor, valid: Tensor | None = None, *, unit: str = "nats") -> Tensor:
    """Return the entropy of each sample's token frequencies, (batch,) float64; 0 for a row without valid tokens.

    Args:
        ids: (batch, seq) integers. valid: (batch, seq) bool, True where a token counts; None: everywhere.
        unit: `"nats"` or `"bits"`.

    Raises:
        ConfigError: shapes disagree, or the unit is neither.

    >>> token_entropy(torch.tensor([[4, 4, 7, 7], [5, 5, 5, 5]]), unit="bits").tolist()
    [1.0, 0.0]
    """
    check_choice("unit", unit, ("nats", "bits"))
    valid = _valid(ids, valid)
    if ids.shape[1] == 0:
        return torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    tokens, order = ids.long().sort(dim=1)
    counted = valid.gather(1, order).double()
    group = F.pad((tokens.diff(dim=1) != 0).long().cumsum(1), (1, 0))  # equal tokens are neighbours now
    counts = torch.zeros_like(counted).scatter_add_(1, group, counted)
    entropy = torch.special.entr(counts / counted.sum(1, keepdim=True).clamp(min=1)).sum(1)
    return entropy / math.log(2) if unit == "bits" else entropy


def distinct_n(ids: Tensor, n: int = 2, valid: Tensor | None = None) -> float:
    """Return the share of distinct n-grams among all n-grams of the samples (batch, seq).

    Raises:
        ConfigError: shapes disagree, or no sample has n valid tokens in a row.

    >>> distinct_n(torch.tensor([[1, 2, 1, 2]]))  # 12, 21, 12
    0.6666666666666666
    """
    check_count("n", n, 1)
    valid = _valid(ids, valid)
    grams = torch.empty(0, n)
    if ids.shape[1] >= n:
        grams = ids.unfold(1, n, 1)[valid.unfold(1, n, 1).all(-1)]
    if not len(grams):
        raise ConfigError(f"ids: got no {n} valid tokens in a row, expected at least one such sample")
    return len(grams.unique(dim=0)) / len(grams)


def self_bleu(ids: Tensor, valid: Tensor | None = None, *, max_n: int = 4) -> float:
    """Return the mean BLEU of every sample against all others, 0 to 1: higher for samples that resemble each other.

    Uniform weights up to max_n-grams; a precision without a match counts as 0.1 match; brevity penalty against the
    closest length. Samples without valid tokens are left out.

    Raises:
        ConfigError: shapes disagree, or fewer than two samples have valid tokens.

    >>> round(self_bleu(torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])), 6)
    1.0
    """
    check_count("max_n", max_n, 1)
    valid = _valid(ids, valid)
    samples = [row[there].tolist() for row, there in zip(ids.cpu(), valid.cpu(), strict=True) if bool(there.any())]
    if len(samples) < 2:
        raise ConfigError(f"ids: got {len(samples)} samples with valid tokens, expected at least 2")
    log_precision = [0.0] * len(samples)
    for n in range(1, max_n + 1):
        grams = [Counter(zip(*(sample[i:] for i in range(n)), strict=False)) for sample in samples]
        # What a sample can match is the most that any *other* has: the largest count, or the second if it is its own.
        most: dict[tuple[int, ...], tuple[int, int, int]] = {}  # largest count, whose, second largest
        for owner, counts in enumerate(grams):
            for gram, count in counts.items():
                first, whose, second = most.get(gram, (0, -1, 0))
                most[gram] = (count, owner, first) if count > first else (first, whose, max(second, count))
        for owner, counts in enumerate(grams):
            matches = 0
            for gram, count in counts.items():
                first, whose, second = most[gram]
                matches += min(count, second if whose == owner else first)
            possible = max(1, len(samples[owner]) - n + 1)
            log_precision[owner] += math.log((matches or 0.1) / possible) / max_n
    lengths = sorted(map(len, samples))
    scores = [
        math.exp(total + min(0.0, 1 - _closest_other(lengths, len(sample)) / len(sample)))
        for total, sample in zip(log_precision, samples, strict=True)
    ]
    return sum(scores) / len(scores)


def _closest_other(lengths: list[int], length: int) -> int:
    """Return the length of another sample that is closest to this one's, the shorter of two; lengths are sorted."""
    own = bisect.bisect_left(lengths, length)
    others = [*lengths[max(0, own - 1) : own], *lengths[own + 1 : own + 2]]
    return min(others, key=lambda other: (abs(other - length), other))


def _valid(ids: Tensor, valid: Tensor | None) -> Tensor:
    if ids.ndim != 2 or ids.is_floating_point():
        raise ConfigError(f"ids: got shape {tuple(ids.shape)} of {ids.dtype}, expected token ids (batch, seq)")
    if valid is not None and valid.shape != ids.shape:
        raise ConfigError(f"valid: got shape {tuple(valid.shape)}, expected {tuple(ids.shape)}")
    return torch.ones_like(ids, dtype=torch.bool) if valid is None else valid.bool()
