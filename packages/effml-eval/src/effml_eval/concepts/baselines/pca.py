"""Principal components: the best linear reconstruction at every number of components, with signed codes.

Every row uses every component, so L0 is their number, and codes are not non-negative: modality scores do not apply.
Cost: 2 N d^2 + O(d^3), through the covariance in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from effml_eval.concepts.baselines.linear_dictionary import LinearDictionary, check_fit

__all__ = ["PCA", "pca", "principal_axes"]


@dataclass(frozen=True)
class PCA(LinearDictionary):
    """Orthonormal components by falling variance; the offset is the mean.

    Attributes:
        variance: (C) of each component.
    """

    variance: Tensor

    def encode(self, x: Tensor) -> Tensor:
        """Return the coordinates (N, C) of embeddings (N, d)."""
        return (self._checked(x) - self.offset) @ self.dictionary.T


def pca(x: Tensor, n_concepts: int) -> PCA:
    """Fit principal components to embeddings (N, d). Signs: the largest coordinate of each component is positive.

    Raises:
        ConfigError: there are fewer rows or dimensions than components, or something is not finite.

    >>> pca(torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 1.0], [2.0, -1.0], [5.0, 0.0], [-1.0, 0.0]]), 1).dictionary
    tensor([[1., 0.]])
    """
    x = check_fit(x, n_concepts, at_most="rank")
    mean, axes, variance = principal_axes(x)
    return PCA(axes[:n_concepts].to(x), mean.to(x), variance[:n_concepts].to(x))


def principal_axes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean (d), all axes (d, d) as rows and their variances (d), falling, in float64."""
    mean = x.mean(0, dtype=torch.float64)
    centred = x.double() - mean
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(x))
    variance, axes = variance.flip(0).clamp(min=0), axes.T.flip(0)
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return mean, axes * largest.sign(), variance
