"""A small world of paired embeddings whose concepts are known: what the experiment on concept autoencoders looks at.

    atom of concept j in modality m = normalise(sqrt(s) s_j + sqrt(1 - s) e_jm)     s_j, e_jm random unit vectors
    embedding = normalise( sum_{j in the pair's concepts} w_jm atom_jm  +- gap g  +  noise )

Both sides of a pair hold the same concepts, drawn without replacement with probability ~ 1 / (1 + j)^decay, at weights
of their own, uniform in [.5, 1.5]; images are shifted by +gap along a unit axis g, texts by -gap. Thus each concept has
an image atom and a text atom at cosine s or so, strong and rare concepts exist, and a modality gap does. Independent of
the paper's data; a miniature of its setting (arXiv 2504.11695) that takes milliseconds: 2 N (k d + C) operations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from effml_shared import seeding
from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_eval.concepts.bridge import BridgeEdges

__all__ = ["PairedWorld", "PairedWorldConfig", "Pairs", "linked_fraction", "make_world"]


@dataclass
class PairedWorldConfig:
    """The laws of a world."""

    dim: int = 64
    concepts: int = 96
    per_pair: int = 5  # concepts of a pair
    shared: float = 0.6  # squared part of the meaning in an atom, the rest is the modality's own
    decay: float = 0.7  # of the concepts' frequencies
    gap: float = 0.5  # half the distance between the modalities, before normalising
    noise: float = 0.02  # deviation per dimension

    def __post_init__(self) -> None:
        for name in ("dim", "concepts", "per_pair"):
            check_count(name, getattr(self, name), 1)
        if self.per_pair > self.concepts:
            raise ConfigError(f"per_pair: got {self.per_pair}, expected at most the {self.concepts} concepts")
        check_range("shared", self.shared, 0.0, math.nextafter(1.0, 2.0))
        for name in ("decay", "gap", "noise"):
            check_range(name, getattr(self, name), 0.0)


class Pairs(NamedTuple):
    """Pairs of embeddings and what they hold.

    Fields:
        image: (N, dim), rows of norm 1.
        text: (N, dim), rows of norm 1.
        concepts: (N, per_pair) int64, of both sides.
    """

    image: Tensor
    text: Tensor
    concepts: Tensor


@dataclass(frozen=True)
class PairedWorld:
    """One world: the true atoms of its concepts.

    Attributes:
        config: its laws.
        image_atoms: (concepts, dim), of norm 1.
        text_atoms: (concepts, dim), of norm 1.
        axis: (dim), of norm 1, towards images.
    """

    config: PairedWorldConfig
    image_atoms: Tensor
    text_atoms: Tensor
    axis: Tensor

    def draw(self, pairs: int, generator: torch.Generator) -> Pairs:
        """Draw pairs; one generator state gives one draw."""
        check_count("pairs", pairs, 0)
        laws = self.config
        frequency = (1.0 + torch.arange(laws.concepts, dtype=torch.float64)) ** -laws.decay
        # The k first arrivals of independent exponential clocks are k draws without replacement.
        clocks = torch.empty(pairs, laws.concepts, dtype=torch.float64).exponential_(generator=generator) / frequency
        concepts = clocks.topk(laws.per_pair, dim=1, largest=False).indices
        sides = []
        for atoms, sign in ((self.image_atoms, 1.0), (self.text_atoms, -1.0)):
            weights = 0.5 + torch.rand(pairs, laws.per_pair, generator=generator)
            meaning = torch.zeros(pairs, laws.concepts).scatter_(1, concepts, weights) @ atoms
            noise = laws.noise * torch.randn(pairs, laws.dim, generator=generator)
            sides.append(F.normalize(meaning + sign * laws.gap * self.axis + noise, dim=1))
        return Pairs(sides[0], sides[1], concepts)


def make_world(config: PairedWorldConfig, seed: int) -> PairedWorld:
    """Draw the atoms of a world.

    >>> world = make_world(PairedWorldConfig(), seed=1)
    >>> cosines = (world.image_atoms * world.text_atoms).sum(1)
    >>> 0.5 < float(cosines.mean()) < 0.7
    True
    """
    generator = seeding.generator(seed, "paired world")

    def directions(count: int) -> Tensor:
        return F.normalize(torch.randn(count, config.dim, generator=generator), dim=1)

    meanings = directions(config.concepts)
    image, text = (
        F.normalize(
            math.sqrt(config.shared) * meanings + math.sqrt(1 - config.shared) * directions(config.concepts), dim=1
        )
        for _ in range(2)
    )
    return PairedWorld(config, image, text, directions(1)[0])


def linked_fraction(world: PairedWorld, dictionary: Tensor, edges: BridgeEdges) -> float:
    """Return the fraction of edges that link one true concept: the image concept's nearest image atom and the text
    concept's nearest text atom have the same index. NaN without edges.

    dictionary (C, dim), atoms of norm 1.
    """
    image = (dictionary @ world.image_atoms.to(dictionary).T).argmax(1)
    text = (dictionary @ world.text_atoms.to(dictionary).T).argmax(1)
    return float((image[edges.image] == text[edges.text]).double().mean())
