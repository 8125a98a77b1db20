"""Per-question scores as vectors, and the clusters that questions belong to.

Questions about one passage, from one template or of one family rise and fall together: the independent unit is then the
cluster, and every interval and test here takes its labels.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from effml_shared.errors import ConfigError
from numpy.typing import ArrayLike, NDArray

__all__ = ["Clusters", "Vector", "check_level", "cluster_index", "cluster_sums", "score_vector", "weight_vector"]

Vector = NDArray[np.float64]
Clusters = Sequence[Hashable]  # one label per question


def score_vector(name: str, values: ArrayLike) -> Vector:
    """Return scores (questions,) in float64.

    Raises:
        ConfigError: there is none, there is more than one axis, or one of them is not a finite number.

    >>> score_vector("scores", [True, False])
    array([1., 0.])
    """
    try:
        vector = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}: got {values!r:.80}, expected numbers, one per question") from None
    if vector.ndim != 1 or not vector.size:
        raise ConfigError(f"{name}: got shape {vector.shape}, expected (questions,) with at least one question")
    if not np.isfinite(vector).all():
        index = int(np.argmin(np.isfinite(vector)))
        raise ConfigError(f"{name}: got {vector[index]} at index {index}, expected finite numbers")
    return vector


def weight_vector(name: str, weights: ArrayLike | None, questions: int) -> Vector:
    """Return the denominators (questions,) of a ratio of sums; None makes it a mean, with ones.

    Raises:
        ConfigError: their number is another, or one of them is not positive.

    >>> weight_vector("weights", None, 2)
    array([1., 1.])
    """
    if weights is None:
        return np.ones(questions)
    vector = score_vector(name, weights)
    if len(vector) != questions:
        raise ConfigError(f"{name}: got {len(vector)}, expected one for each of {questions} questions")
    if vector.min() <= 0:
        raise ConfigError(f"{name}: got {vector.min()}, expected positive numbers (leave empty documents out)")
    return vector


def cluster_index(clusters: Clusters, questions: int) -> tuple[NDArray[np.int64], int]:
    """Return each question's cluster number, in order of appearance, and how many clusters there are.

    >>> cluster_index(["b", "a", "b"], 3)
    (array([0, 1, 0]), 2)
    """
    labels: Sequence[Any] = list(clusters)
    if len(labels) != questions:
        raise ConfigError(f"clusters: got {len(labels)} labels, expected one for each of {questions} questions")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)
    return index, len(numbers)


def cluster_sums(values: Vector, clusters: Clusters | None) -> Vector:
    """Return the sum of each cluster (clusters,); without clusters, every question is its own."""
    if clusters is None:
        return values
    index, count = cluster_index(clusters, len(values))
    return np.asarray(np.bincount(index, weights=values, minlength=count), dtype=np.float64)


def check_level(level: float) -> None:
    """Raise a `ConfigError` unless a confidence level lies between 0 and 1."""
    if not 0 < level < 1:
        raise ConfigError(f"level: got {level}, expected a number between 0 and 1")
