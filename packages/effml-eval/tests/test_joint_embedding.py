from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from effml_eval.experiments.digit_captions import VOCABULARY
from effml_eval.experiments.joint_embedding import (
    CaptionedImages,
    EmbeddingConfig,
    JointEmbedding,
    contrastive_loss,
)
from effml_shared.errors import ConfigError
from torch import Tensor, nn

CONFIG = EmbeddingConfig(dim=6, width=2)


def _batch(rows: int = 5) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    pixels = torch.rand(rows, 8, 8, generator=draws)
    return {"pixels": pixels, "bags": torch.randint(0, 2, (rows, len(VOCABULARY)), generator=draws).float()}


class _Logits(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, pixels: Tensor, bags: Tensor) -> Tensor:
        return self.logits


def test_embeddings_are_unit_vectors_and_follow_from_the_seed() -> None:
    batch = _batch()
    models = [JointEmbedding(CONFIG, seed=seed) for seed in (1, 1, 2)]
    first, same, other = [model.embed_images(batch["pixels"]) for model in models]
    assert torch.equal(first, same)
    assert not torch.allclose(first, other)
    for side in (first, models[0].embed_captions(batch["bags"])):
        assert side.shape == (5, 6)
        torch.testing.assert_close(side.norm(dim=1), torch.ones(5))


def test_logits_are_cosines_times_a_scale_that_is_bounded() -> None:
    batch, model = _batch(), JointEmbedding(CONFIG, seed=1)
    cosines = model.embed_images(batch["pixels"]) @ model.embed_captions(batch["bags"]).T
    torch.testing.assert_close(model(**batch), cosines / 0.07)
    with torch.no_grad():
        model.log_scale.fill_(20.0)
    torch.testing.assert_close(model(**batch), 100 * cosines)


def test_the_loss_is_that_of_picking_the_partner_either_way() -> None:
    logits = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    naive = 0.0
    for n in range(4):
        row, column = logits[n].exp(), logits[:, n].exp()
        naive -= 0.5 * float(torch.log(row[n] / row.sum()) + torch.log(column[n] / column.sum()))
    total, count = contrastive_loss(_Logits(logits), _batch(4))
    assert float(total) == pytest.approx(naive, rel=1e-12)
    assert int(count) == 4
    assert float(contrastive_loss(_Logits(torch.zeros(7, 7)), _batch(7))[0]) == pytest.approx(7 * math.log(7))


def test_every_weight_has_a_gradient() -> None:
    model = JointEmbedding(CONFIG, seed=1)
    contrastive_loss(model, _batch())[0].backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


def test_samples_are_pairs() -> None:
    batch = _batch()
    pairs = CaptionedImages(batch["pixels"], batch["bags"])
    taken = pairs.batch(np.array([3, 0]))
    assert len(pairs) == 5
    assert torch.equal(taken["pixels"], batch["pixels"][[3, 0]])
    assert torch.equal(taken["bags"], batch["bags"][[3, 0]])
    assert pairs.fingerprint != CaptionedImages(batch["pixels"], batch["bags"].roll(1, 1) * 2).fingerprint


def test_configurations_that_cannot_be_are_refused() -> None:
    for bad, message in (({"dim": 0}, r"^dim: got 0"), ({"lr": -1.0}, r"^lr: got -1.0")):
        with pytest.raises(ConfigError, match=message):
            replace(CONFIG, **bad)
