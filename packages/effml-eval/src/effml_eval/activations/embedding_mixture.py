"""Stored embeddings of several modalities in fixed proportions, as samples for the shared `Loader`.

With n_m rows and weight w_m of modality m, an epoch has s w_m of its rows, s being the least number for which all are
in it: max_m n_m / w_m. Where that is more than n_m, rows repeat. Nothing is copied: a batch reads the rows it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from effml_shared.checks import check_choice
from effml_shared.errors import ConfigError
from effml_shared.tensors import widen
from numpy.typing import NDArray
from torch import Tensor

from effml_eval.activations.embedding_shards import EmbeddingShards

__all__ = ["EmbeddingMixture"]


class EmbeddingMixture:
    """Mix modalities: `Loader(EmbeddingMixture(shards, {"image": 1, "text": 1}))` serves as many of each.

    An epoch holds every row at least once, and none more than once oftener than another of its modality.

    Args:
        shards: where the rows are.
        weights: of the modalities, any scale; None: as many of each as there are.

    Raises:
        ConfigError: a weight is not a number above 0, or there is no such modality.
    """

    def __init__(self, shards: EmbeddingShards, weights: Mapping[str, float] | None = None) -> None:
        self.shards = shards
        parts = dict(weights) if weights is not None else dict(shards.sizes)
        if not parts or not all(0 < weight < float("inf") for weight in parts.values()):
            raise ConfigError(f"weights: got {weights}, expected a number above 0 for each modality")
        for modality in parts:
            check_choice("modality", modality, shards.sizes)
        scale = max(shards.sizes[modality] / weight for modality, weight in parts.items())
        self.quotas = {modality: round(scale * weight) for modality, weight in parts.items()}
        self.fingerprint: dict[str, Any] = {**shards.fingerprint, "quotas": self.quotas}

    def __len__(self) -> int:
        return sum(self.quotas.values())

    def batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return `{"x": (len(indices), d)}`, in float32 at least."""
        x, start = torch.empty(len(indices), self.shards.dim, dtype=self.shards.dtype), 0
        for modality, quota in self.quotas.items():
            here = np.flatnonzero((indices >= start) & (indices < start + quota))
            rows = (indices[here] - start) % self.shards.sizes[modality]
            x[torch.from_numpy(here)] = self.shards.take(modality, rows)
            start += quota
        return {"x": widen(x)}
