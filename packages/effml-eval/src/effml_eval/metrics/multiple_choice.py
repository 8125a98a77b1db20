"""Scores of a multiple-choice question from the log-likelihoods of its choices.

With LL_j the log-likelihood (nats) of choice j after the question, the choice taken is

    acc        argmax LL_j                              acc_token   argmax LL_j / tokens of j
    acc_norm   argmax LL_j / characters of j            acc_pmi     argmax LL_j - LL_j without the question
    acc_bytes  argmax LL_j / UTF-8 bytes of j

ties going to the first. Lengths are those of the choice itself, without the blank that joins it to the question. With
p = softmax(LL): `prob` is p[gold], `brier` sum_j (p_j - 1[j = gold])^2, `nll` -ln p[gold], `confidence` max_j p_j; the
calibration error compares the confidence with `acc` over many questions.

Cost: O(choices). Names and meanings of acc and acc_norm are those of EleutherAI/lm-evaluation-harness.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from numpy.typing import ArrayLike, NDArray

from effml_eval.statistics.scores import score_vector

__all__ = ["expected_calibration_error", "multiple_choice_scores"]


def multiple_choice_scores(
    logprobs: ArrayLike,
    gold: int,
    *,
    choices: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
    unconditional: ArrayLike | None = None,
) -> dict[str, float]:
    """Return the scores of one question; those whose ingredients are absent are left out.

    Args:
        logprobs: (choices,), nats; -inf for a choice the model excludes.
        gold: index of the right choice.
        choices: their texts, for acc_norm and acc_bytes.
        tokens: of each choice, for acc_token.
        unconditional: (choices,), log-likelihoods without the question, for acc_pmi.

    Raises:
        ConfigError: gold is no index of a choice, a text is empty, lengths differ, or a log-likelihood is NaN.

    >>> scores = multiple_choice_scores([-6, -5, -9], 2, choices=["cat", "dog", "elephants"])
    >>> scores["acc"], scores["acc_norm"], round(scores["prob"], 6)
    (0.0, 1.0, 0.013213)
    """
    ll = _logprobs("logprobs", logprobs)
    try:
        right = operator.index(gold)
    except TypeError:
        right = -1
    if not 0 <= right < len(ll):
        raise ConfigError(f"gold: got {gold!r}, expected the index of one of {len(ll)} choices")

    def hit(ranked: NDArray[np.float64]) -> float:
        return float(np.argmax(ranked) == right)

    probabilities = np.exp(ll - ll.max())
    probabilities /= probabilities.sum()
    onehot = np.arange(len(ll)) == right
    scores = {
        "acc": hit(ll),
        "prob": float(probabilities[right]),
        "brier": float(((probabilities - onehot) ** 2).sum()),
        "nll": float(np.log(np.exp(ll - ll.max()).sum()) + ll.max() - ll[right]),
        "confidence": float(probabilities.max()),
    }
    if choices is not None:
        scores["acc_norm"] = hit(ll / _lengths("choices", [len(choice) for choice in choices], len(ll)))
        scores["acc_bytes"] = hit(ll / _lengths("choices", [len(choice.encode()) for choice in choices], len(ll)))
    if tokens is not None:
        scores["acc_token"] = hit(ll / _lengths("tokens", tokens, len(ll)))
    if unconditional is not None:
        prior = _logprobs("unconditional", unconditional)
        if len(prior) != len(ll) or not np.isfinite(prior).all():
            raise ConfigError(f"unconditional: got {prior.tolist()!r:.80}, expected {len(ll)} finite numbers")
        scores["acc_pmi"] = hit(ll - prior)
    return scores


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Return the mean gap between confidence and accuracy over equal-width bins (low, high].

    Args:
        confidence: (questions,), of the choice taken, in [0, 1].
        correct: (questions,), 0 or 1.
        bins: of the unit interval; 0 belongs to the first.

    Raises:
        ConfigError: lengths differ, or a confidence is not a probability.

    >>> round(expected_calibration_error([0.9, 0.9, 0.6], [1, 0, 1]), 6)
    0.4
    """
    check_count("bins", bins, 1)
    p, hits = score_vector("confidence", confidence), score_vector("correct", correct)
    if len(p) != len(hits) or p.min() < 0 or p.max() > 1 + 1e-9:
        raise ConfigError(f"confidence: got {len(p)} in [{p.min()}, {p.max()}], expected {len(hits)} probabilities")
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.searchsorted(edges, p, side="left") - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=p - hits, minlength=bins)
    return float(np.abs(gaps).sum()) / len(p)


def _logprobs(name: str, values: ArrayLike) -> NDArray[np.float64]:
    ll = np.asarray(values, dtype=np.float64)
    if ll.ndim != 1 or len(ll) < 1 or np.isnan(ll).any() or ll.max() == np.inf or ll.max() == -np.inf:
        raise ConfigError(f"{name}: got {np.asarray(values).tolist()!r:.80}, expected a log-likelihood per choice")
    return ll


def _lengths(name: str, lengths: Sequence[int], choices: int) -> NDArray[np.int64]:
    if len(lengths) != choices or min(lengths) < 1:
        raise ConfigError(f"{name}: got lengths {list(lengths)}, expected {choices} choices, none of them empty")
    return np.asarray(lengths)
