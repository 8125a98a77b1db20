"""A joint embedding of handwritten digits and captions, trained contrastively: a miniature of CLIP.

    image: two convolutions and a linear map      caption: bag of words, one hidden layer      both to unit vectors
    loss = mean of the cross-entropies of picking, in a batch, the caption of an image and the image of a caption

Logits are cosines times a learnt scale, at most 100. The order of words is not seen, which says nothing in these
captions. Captions that fit another image of the batch as well count as wrong ones, as they do in CLIP.
Cost: some 20 MFLOPs per image and step at the default width. Source: arXiv 2103.00020, section 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from effml_shared import seeding
from effml_shared.checks import check_count, check_range
from numpy.typing import NDArray
from torch import Tensor, nn

from effml_eval.experiments.digit_captions import VOCABULARY

__all__ = ["CaptionedImages", "EmbeddingConfig", "JointEmbedding", "contrastive_loss"]

FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0


@dataclass
class EmbeddingConfig:
    """The joint embedding and its training."""

    dim: int = 32
    width: int = 16  # channels of the first convolution
    captions: int = 8  # per training image
    steps: int = 400
    batch_size: int = 256  # pairs
    lr: float = 3e-3  # peak, of AdamW
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        for name in ("dim", "width", "captions", "steps", "batch_size"):
            check_count(name, getattr(self, name), 1)
        for name in ("lr", "weight_decay"):
            check_range(name, getattr(self, name), 0.0)


class JointEmbedding(nn.Module):
    """Two encoders and the scale of their cosines; the seed is that of their weights."""

    def __init__(self, config: EmbeddingConfig, *, seed: int) -> None:
        super().__init__()
        dim, width = config.dim, config.width
        self.image = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(2 * width * 16, dim),
        )
        self.text = nn.Sequential(nn.Linear(len(VOCABULARY), 8 * width), nn.GELU(), nn.Linear(8 * width, dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(FIRST_SCALE)))
        draws = seeding.generator(seed, "joint embedding")
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, std=math.sqrt(2 / module.weight[0].numel()), generator=draws)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Return unit vectors (N, dim) of images (N, 8, 8)."""
        return F.normalize(self.image(pixels[:, None]), dim=1)

    def embed_captions(self, bags: Tensor) -> Tensor:
        """Return unit vectors (N, dim) of bags of words (N, words)."""
        return F.normalize(self.text(bags), dim=1)

    def forward(self, pixels: Tensor, bags: Tensor) -> Tensor:
        """Return logits (N, N) of pairs: images by rows, captions by columns."""
        scale = self.log_scale.exp().clamp(max=LARGEST_SCALE)
        return scale * (self.embed_images(pixels) @ self.embed_captions(bags).T)


def contrastive_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the loss summed over pairs (nats), and how many there are; row n of `pixels` and `bags` is a pair."""
    logits = model(batch["pixels"], batch["bags"])
    own = torch.arange(len(logits), device=logits.device)
    both = F.cross_entropy(logits, own, reduction="sum") + F.cross_entropy(logits.T, own, reduction="sum")
    return both / 2, torch.tensor(len(logits))


class CaptionedImages:
    """Pairs as samples for the shared `Loader`.

    Args:
        pixels: (N, 8, 8) float32.
        bags: (N, words), several captions of one image being several pairs.
    """

    def __init__(self, pixels: Tensor, bags: Tensor) -> None:
        self.pixels, self.bags = pixels, bags
        self.fingerprint: dict[str, Any] = {"pairs": len(bags), "words": float(bags.sum())}

    def __len__(self) -> int:
        return len(self.bags)

    def batch(self, indices: NDArray[np.int64]) -> dict[str, Tensor]:
        """Return `{"pixels": (rows, 8, 8), "bags": (rows, words)}`."""
        rows = torch.from_numpy(indices)
        return {"pixels": self.pixels[rows], "bags": self.bags[rows]}
