"""Embeddings of images and captions in their joint space, by a model of the CLIP and SigLIP kind.

Such a model has `get_image_features` and `get_text_features`, as those of Hugging Face's transformers do. Rows are
normalised: the dictionaries of a joint space are learnt from directions (arXiv 2504.11695).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from effml_shared.errors import ConfigError
from effml_shared.generation import evaluating
from effml_shared.tensors import widen
from torch import Tensor, nn

__all__ = ["image_text_embedders"]

_MODALITIES = {"image": "get_image_features", "text": "get_text_features"}


def image_text_embedders(model: nn.Module) -> dict[str, Callable[[Mapping[str, Any]], Tensor]]:
    """Return what makes unit rows (n, d), float32 at least, from a batch of images, and of captions.

    The batches are what the model's processor returns: `pixel_values` (n, channels, height, width); `input_ids` and
    `attention_mask` (n, seq), padded as the model was trained (SigLIP: to its full length, without a mask).

    Raises:
        ConfigError: the model has no such features.
    """
    for method in _MODALITIES.values():
        if not callable(getattr(model, method, None)):
            raise ConfigError(f"model: got a {type(model).__name__} without {method}, expected one like CLIPModel")
    return {modality: partial(_embed, model, method) for modality, method in _MODALITIES.items()}


@torch.no_grad()
def _embed(model: nn.Module, method: str, batch: Mapping[str, Any]) -> Tensor:
    device = next(model.parameters()).device
    with evaluating(model):
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        features: Any = getattr(model, method)(**inputs)
    pooled = features if isinstance(features, Tensor) else features.pooler_output  # since transformers 5
    return F.normalize(widen(pooled), dim=-1)
