"""What arXiv 2504.11695 claims of the concepts in a joint space, as claims over the numbers that `sae_measures` finds.

The sizes that count as holding are ours, where the paper's were not read; every experiment on concepts is held to the
same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from effml_shared.experiments import Claim

__all__ = ["CLAIMS", "KINDS", "MAIN", "TWIN", "combined", "effects", "ratio"]

KINDS = {"BatchTopK": "batch_topk", "TopK": "topk", "JumpReLU": "jumprelu"}
"""Autoencoders by the names they have in tables."""

MAIN = "BatchTopK"
TWIN = "BatchTopK, another seed"

CLAIMS = (
    Claim(
        "front",
        "At equal sparsity a sparse autoencoder explains more than any linear method",
        "autoencoders dominate the front on four models; no number read",
        " of R² more than the best of PCA, k-means, ICA, semi-NMF",
        at_least=0.0,
    ),
    Claim(
        "best autoencoder",
        "BatchTopK explains more than TopK and JumpReLU at about the same sparsity",
        "slightly the best of three; no number read",
        " of R² more than the better of the two",
        at_least=0.0,
    ),
    Claim(
        "strong are stable",
        "The concepts of most energy are found again by another seed",
        "high for concepts of high energy; no number read",
        " mean cosine to the other seed's atoms, the strongest concepts",
        at_least=0.95,
    ),
    Claim(
        "rare are not",
        "Concepts of little energy are not found again",
        "low for rare concepts; no number read",
        " of mean cosine between the strongest and the weakest concepts",
        at_least=0.3,
    ),
    Claim(
        "strong carry the energy",
        "Few stable concepts carry most of the energy",
        "no number read",
        " of all energy on the strongest quarter",
        at_least=0.5,
    ),
    Claim(
        "one modality",
        "Most concepts fire almost only for one modality",
        "most; no number read",
        " of the energy on concepts at least 90% of one modality",
        at_least=0.7,
    ),
    Claim(
        "off the axis",
        "Yet most atoms are nearly orthogonal to the modality axis",
        "nearly orthogonal; no number read",
        "° between the median atom and the axis",
        at_least=78.5,
    ),
    Claim(
        "poor classifiers",
        "One concept alone hardly tells the modalities apart",
        "poor classifiers; no number read",
        "% errors (balanced) of the median concept's best threshold",
        at_least=40.0,
    ),
    Claim(
        "bridges",
        "The strongest bridges link an image concept with the text concept of the same meaning",
        "matching pairs by eye; the comparison with co-activation alone is ours",
        " times as many true links as the strongest co-activations",
        at_least=1.5,
    ),
)
"""The claims of the paper; `effects` gives their numbers."""


def effects(
    points: Mapping[str, list[dict[str, Any]]], numbers: Mapping[str, list[float | None]], seeds: int
) -> dict[str, list[float | None]]:
    """Return one number per seed for every claim; None where a training diverged.

    Args:
        points: `l0` and `r2` per seed of every method: those of `KINDS`, `TWIN`, and the linear ones.
        numbers: of `ConceptMeasures`, by name, one per seed; empty where no dictionary could be read.
        seeds: how many there are.
    """
    unknown: list[float | None] = [None] * seeds
    r2 = {name: [row["r2"] for row in rows] for name, rows in points.items()}
    linear = [name for name in points if name not in (*KINDS, TWIN)]
    others = [name for name in KINDS if name != MAIN]

    def column(name: str) -> list[float | None]:
        return numbers.get(name, unknown)

    def lead(rivals: list[str]) -> list[float | None]:
        best = [_largest([r2[name][i] for name in rivals]) for i in range(seeds)]
        return [combined(lambda a, b: a - b, mine, rival) for mine, rival in zip(r2[MAIN], best, strict=True)]

    return {
        "front": lead(linear),
        "best autoencoder": lead(others),
        "strong are stable": column("stability, strong"),
        "rare are not": [
            combined(lambda a, b: a - b, strong, weak)
            for strong, weak in zip(column("stability, strong"), column("stability, weak"), strict=True)
        ],
        "strong carry the energy": column("energy share"),
        "one modality": column("one modality, energy"),
        "off the axis": column("degrees to the axis"),
        "poor classifiers": column("errors of the median concept"),
        "bridges": [
            combined(ratio, bridge, plain)
            for bridge, plain in zip(column("linked by bridge"), column("linked by co-activation"), strict=True)
        ],
    }


def combined(rule: Callable[[float, float], float], value: float | None, other: float | None) -> float | None:
    """Return the rule of two numbers; None where one is not known, as after a divergence."""
    return None if value is None or other is None else rule(value, other)


def ratio(a: float, b: float) -> float:
    """Return a / b, and infinity for b of 0."""
    return a / b if b else math.inf


def _largest(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None
