from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from effml_eval.activations.embedding_mixture import EmbeddingMixture
from effml_eval.activations.embedding_shards import EmbeddingShards, ShardWriter
from effml_eval.sae.autoencoder import SparseAutoencoder
from effml_eval.sae.autoencoder_config import SAEConfig
from effml_eval.sae.training import SAETrainingConfig, train_sae
from effml_shared.data.loader import Loader
from effml_shared.errors import ConfigError
from torch import Tensor

GENERATOR = torch.Generator().manual_seed(0)
IMAGES, TEXTS = torch.randn(10, 4, generator=GENERATOR), torch.randn(25, 4, generator=GENERATOR)


def write(directory: Path, dtype: torch.dtype = torch.float32) -> EmbeddingShards:
    with ShardWriter(directory, rows_per_shard=4, dtype=dtype) as writer:
        writer.add("image", IMAGES)
        writer.add("text", TEXTS)
    return EmbeddingShards(directory)


def counts(mixture: EmbeddingMixture) -> tuple[Tensor, Tensor]:
    """Return how often each image and each text is in an epoch."""
    x = mixture.batch(np.arange(len(mixture)))["x"]
    return tuple((x[:, None] == rows[None]).all(2).sum(0) for rows in (IMAGES, TEXTS))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("weights", "quotas"),
    [
        (None, {"image": 10, "text": 25}),
        ({"image": 1, "text": 1}, {"image": 25, "text": 25}),
        ({"image": 3.0, "text": 1.0}, {"image": 75, "text": 25}),
        ({"text": 0.1, "image": 0.9}, {"text": 25, "image": 225}),
        ({"image": 0.01, "text": 0.99}, {"image": 10, "text": 990}),
        ({"text": 2}, {"text": 25}),
    ],
)
def test_mixtures(tmp_path: Path, weights: dict[str, float] | None, quotas: dict[str, int]) -> None:
    mixture = EmbeddingMixture(write(tmp_path), weights)
    assert mixture.quotas == quotas
    assert len(mixture) == sum(quotas.values())
    for modality, often in zip(("image", "text"), counts(mixture), strict=True):
        assert int(often.sum()) == quotas.get(modality, 0)
        assert int(often.max() - often.min()) <= 1
        assert int(often.min()) >= (modality in quotas)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dictionary_learns_from_a_mixture(tmp_path: Path, dtype: torch.dtype) -> None:
    data = Loader(EmbeddingMixture(write(tmp_path, dtype), {"image": 1, "text": 1}))
    sae = SparseAutoencoder(SAEConfig(d_in=4, n_concepts=8, k=2, kind="topk"))
    before = sae.dictionary.detach().clone()
    train_sae(sae, data, SAETrainingConfig(steps=4, batch_size=8, lr=1e-2))
    assert bool(sae.dictionary.isfinite().all())
    assert not torch.equal(sae.dictionary, before)


def test_resumes_exactly(tmp_path: Path) -> None:
    data = Loader(EmbeddingMixture(write(tmp_path)), seed=1)
    data.next(20)
    again = Loader(EmbeddingMixture(EmbeddingShards(tmp_path)), seed=1)
    again.load_state_dict(json.loads(json.dumps(data.state_dict())))
    assert torch.equal(data.next(30)["x"], again.next(30)["x"])


def test_refuses_weights(tmp_path: Path) -> None:
    shards = write(tmp_path)
    for weights in ({}, {"image": 0.0}, {"image": torch.inf}):
        with pytest.raises(ConfigError, match=r"weights: got"):
            EmbeddingMixture(shards, weights)
    with pytest.raises(ConfigError, match=r"modality: got 'audio'"):
        EmbeddingMixture(shards, {"audio": 1.0})
