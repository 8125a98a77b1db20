"""Which bridges are more than chance: against the same images and captions, paired at random.

Shuffling the captions keeps what every concept does and destroys what belongs together. For an edge of score s among
all edges, the false discovery rate is

    FDR(s) = mean number of edges >= s over shuffles / number of edges >= s as observed
    q(s) = smallest FDR(t) at any t <= s

The null is pooled over all concept pairs, so it judges scores that are comparable between pairs: with `center=True`
(the default here) each pair's own chance level is subtracted before. Cost: one accumulation per shuffle.
Source: the shuffled null is the usual one; its use on bridges is ours.
"""

from __future__ import annotations

import torch
from effml_shared.checks import check_count
from torch import Tensor

from effml_eval.concepts.bridge import BridgeEdges, bridge_edges, bridge_matrix
from effml_eval.concepts.code_entries import Codes, check_pairs
from effml_eval.sae.sparse_codes import SparseCodes

__all__ = ["significant_bridges"]


def significant_bridges(
    image_codes: Codes,
    text_codes: Codes,
    dictionary: Tensor,
    top: int,
    *,
    gram: str = "raw",
    center: bool = True,
    normalize: bool = False,
    shuffles: int = 10,
    generator: torch.Generator | None = None,
) -> tuple[BridgeEdges, Tensor]:
    """Return the `top` bridges of pairs (N, C) and the q-value (edges) float64 of each, in [0, 1].

    Args:
        top: edges, by falling score.
        gram: see `BridgeAccumulator.matrix`, as the next two.
        shuffles: q is no finer than 1 / (shuffles x rank).
        generator: of the shuffles, on the CPU.

    Raises:
        ConfigError: see `bridge_matrix`.
    """
    check_count("shuffles", shuffles, 1)
    rows = check_pairs(image_codes, text_codes)

    def matrix(text: Codes) -> Tensor:
        return bridge_matrix(image_codes, text, dictionary, gram=gram, center=center, normalize=normalize)

    edges = bridge_edges(matrix(text_codes), top)
    chance = torch.zeros(len(edges.score), dtype=torch.float64)
    rising = edges.score.flip(0).contiguous()
    for _ in range(shuffles):
        order = torch.randperm(rows, generator=generator)
        null = matrix(_reordered(text_codes, order))
        scores = null.coalesce().values() if null.is_sparse else null.flatten()
        if not len(rising):
            break
        scores = scores[scores >= rising[0]]
        reached = torch.searchsorted(rising, scores, right=True).bincount(minlength=len(rising) + 1)[1:]
        chance += reached.flip(0).cumsum(0).cpu()  # a score that reaches a strong edge reaches the weaker ones too
    return edges, _q_values(edges.score.cpu(), chance / shuffles)


def _q_values(score: Tensor, chance: Tensor) -> Tensor:
    """Return q from falling scores and the chance count at each."""
    if not len(score):
        return chance
    observed = torch.searchsorted(-score, -score, right=True)  # ties count all
    rate = (chance / observed).clamp(max=1.0)
    return rate.flip(0).cummin(0).values.flip(0)


def _reordered(codes: Codes, order: Tensor) -> Codes:
    if isinstance(codes, SparseCodes):
        order = order.to(codes.values.device)
        return SparseCodes(codes.values[order], codes.indices[order], codes.n_concepts)
    return codes[order.to(codes.device)]
