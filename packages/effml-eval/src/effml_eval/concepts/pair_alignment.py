"""How well images and captions lie together: pair similarity, retrieval both ways, the gap between modalities.

    similarity = mean_n cos(x_n, y_n)      gap = |mean x - mean y|
    R@k = fraction of rows whose partner is among the k nearest

What an intervention changes is the difference of these before and after. The rank of a partner counts everything that
is at least as near, so ties (all embeddings equal, say) earn nothing. FLOPs: 2 N^2 d. Memory: blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_eval.concepts.code_entries import BLOCK, check_matrix

__all__ = ["PairAlignment", "modality_gap", "pair_alignment", "retrieval_ranks"]


@dataclass(frozen=True)
class PairAlignment:
    """How well pairs lie together.

    Attributes:
        similarity: mean cosine of pairs.
        gap: distance of the two means, of embeddings of norm 1.
        image_to_text: k to the fraction of images whose caption is among the k nearest captions.
        text_to_image: the other way round.
    """

    similarity: float
    gap: float
    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


def pair_alignment(image: Tensor, text: Tensor, *, ks: Sequence[int] = (1,)) -> PairAlignment:
    """Measure pairs (N, d), row n of both belonging together; rows are normalised first.

    Raises:
        ConfigError: the sets are empty, differ in shape, or are not finite.
    """
    for k in ks:
        check_count("ks", k, 1)
    image, text = _pairs(image, text)
    forth, back = retrieval_ranks(image, text), retrieval_ranks(text, image)
    return PairAlignment(
        similarity=float((image * text).sum(1).double().mean()),
        gap=modality_gap(image, text),
        image_to_text={k: float((forth <= k).double().mean()) for k in ks},
        text_to_image={k: float((back <= k).double().mean()) for k in ks},
    )


def retrieval_ranks(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the rank (N) int64, from 1, of key n among all keys (N, d) by cosine to query n (N, d).

    Raises:
        ConfigError: the sets are empty, differ in shape, or are not finite.

    >>> retrieval_ranks(torch.tensor([[1.0, 0.0], [1.0, 0.1]]), torch.eye(2)).tolist()
    [1, 2]
    """
    queries, keys = _pairs(queries, keys)
    ranks = []
    for start in range(0, len(queries), size := max(1, BLOCK // len(keys))):
        similarity = queries[start : start + size] @ keys.T
        own = similarity.diagonal(start)[: len(similarity), None]
        ranks.append((similarity >= own).sum(1))
    return torch.cat(ranks)


def modality_gap(image: Tensor, text: Tensor) -> float:
    """Return the distance between the means of image (N, d) and text (M, d) embeddings, as they are.

    Raises:
        ConfigError: a set is empty or not finite, or they differ in d.
    """
    image = check_matrix("image", image)
    text = check_matrix("text", text, columns=image.shape[1])
    if not len(image) or not len(text):
        raise ConfigError(f"image, text: got {len(image)} and {len(text)} rows, expected at least one each")
    difference = image.mean(0, dtype=torch.float64) - text.mean(0, dtype=torch.float64)
    return float(torch.linalg.vector_norm(difference))


def _pairs(image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    image, text = check_matrix("image", image), check_matrix("text", text)
    if image.shape != text.shape or not len(image):
        raise ConfigError(f"text: got shape {tuple(text.shape)} beside {tuple(image.shape)}, expected one row per pair")
    dtype = torch.promote_types(image.dtype, text.dtype)
    return F.normalize(image.to(dtype), dim=1), F.normalize(text.to(dtype), dim=1)
