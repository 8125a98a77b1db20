"""Perplexity and bits per byte of a corpus: ratios of sums over documents, never means of per-document perplexities.

With LL_d the log-likelihood of document d (nats), and T_d, Y_d, W_d its tokens, UTF-8 bytes and words,

    token_ppl = exp(-sum LL / sum T)    byte_ppl = exp(-sum LL / sum Y)    bits_per_byte = -sum LL / (ln 2 sum Y)
    word_ppl  = exp(-sum LL / sum W)

Bytes and words are those of the original text, words separated by white space. Only what is per byte or per word can
be compared between tokenizers. Intervals resample whole documents: their tokens are anything but independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from effml_shared.errors import ConfigError
from numpy.typing import ArrayLike

from effml_eval.scoring.scorer import RollingScore
from effml_eval.statistics.bootstrap import bootstrap_ci
from effml_eval.statistics.estimate import Estimate
from effml_eval.statistics.scores import Clusters, Vector, cluster_index, score_vector

__all__ = ["bits_per_byte", "perplexity", "text_likelihood"]


def perplexity(logprobs: ArrayLike, counts: ArrayLike) -> float:
    """Return exp(-sum of log-likelihoods / sum of tokens, words or bytes), both (documents,).

    Raises:
        ConfigError: lengths differ, a number is not finite, a count negative, or all counts are 0.

    >>> round(perplexity([-2.0, -3.0], [1, 9]), 6)
    1.648721
    """
    return float(_exp(np.array([_nats_per_unit(logprobs, counts)]))[0])


def bits_per_byte(logprobs: ArrayLike, n_bytes: ArrayLike) -> float:
    """Return the bits a code for the text needs per UTF-8 byte, from log-likelihoods and bytes, both (documents,).

    >>> round(bits_per_byte([-12.0], [10]), 6)
    1.731234
    """
    return _nats_per_unit(logprobs, n_bytes) / math.log(2)


def text_likelihood(
    documents: Sequence[RollingScore],
    *,
    clusters: Clusters | None = None,
    method: str = "percentile",
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Estimate the four ratios of a corpus with bootstrap intervals over documents.

    Empty documents say nothing and are left out. There is no `word_ppl` if a document has tokens but no words.

    Args:
        documents: scored.
        clusters: one label per document, as of the book that chapters are from.
        method: `"percentile"` or `"bca"`.
        level: of the intervals.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ConfigError: no document has any text.

    >>> estimates = text_likelihood([RollingScore(-12.0, 4, 10, 2), RollingScore(0.0, 0, 0, 0)])
    >>> {name: round(estimate.value, 4) for name, estimate in estimates.items()}
    {'token_ppl': 20.0855, 'byte_ppl': 3.3201, 'bits_per_byte': 1.7312, 'word_ppl': 403.4288}
    """
    kept = [index for index, document in enumerate(documents) if document.n_tokens]
    if not kept:
        raise ConfigError(f"documents: got {len(documents)} without any token, expected at least one with text")
    nats = [-documents[index].logprob for index in kept]
    labels = None if clusters is None else cluster_index(clusters, len(documents))[0][kept].tolist()

    def ratio(counts: Sequence[int], bits: bool = False) -> Estimate:
        return bootstrap_ci(
            nats,
            counts,
            transform=_bits if bits else _exp,
            clusters=labels,
            method=method,
            level=level,
            resamples=resamples,
            seed=seed,
        )

    n_bytes = [documents[index].n_bytes for index in kept]
    words = [documents[index].n_words for index in kept]
    estimates = {
        "token_ppl": ratio([documents[index].n_tokens for index in kept]),
        "byte_ppl": ratio(n_bytes),
        "bits_per_byte": ratio(n_bytes, bits=True),
    }
    return {**estimates, "word_ppl": ratio(words)} if all(words) else estimates


def _nats_per_unit(logprobs: ArrayLike, counts: ArrayLike) -> float:
    ll, units = score_vector("logprobs", logprobs), score_vector("counts", counts)
    if len(ll) != len(units) or units.min() < 0 or not units.any():
        raise ConfigError(f"counts: got {len(units)}, expected {len(ll)} of at least 0, not all of them 0")
    return float(-ll.sum() / units.sum())


def _exp(nats: Vector) -> Vector:
    with np.errstate(over="ignore"):  # perplexity inf, and no warning
        return np.exp(nats)


def _bits(nats: Vector) -> Vector:
    return nats / math.log(2)
