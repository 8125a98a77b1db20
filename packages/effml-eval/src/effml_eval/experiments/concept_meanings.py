"""What concepts mean, where every input is known: the fact that their strongest inputs share beyond chance.

Of N inputs K have a fact; of the n strongest inputs of a concept, x. Drawn at random, x would be hypergeometric, so

    p = P(X >= x),  X ~ Hypergeometric(N, K, n)

and a concept means the fact of least p, if p times the number of facts stays below `LEVEL`; otherwise it means nothing.
A concept has one meaning among images and one among captions. Cost: C x facts tail probabilities. The rule is ours.
"""

from __future__ import annotations

import torch
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_eval.concepts.bridge import BridgeEdges

__all__ = ["LEVEL", "NONE", "meanings", "same_meaning"]

LEVEL = 0.01
NONE = -1
"""Meaning of a concept that has none."""


def meanings(top_rows: Tensor, facts: Tensor) -> Tensor:
    """Return the meaning of every concept, (C) int64: a column of `facts`, or `NONE`.

    Args:
        top_rows: (C, top) int64, rows of the strongest inputs; -1 where there are fewer.
        facts: (N, facts) bool, of the inputs.

    Raises:
        ConfigError: there are no facts, or a row is none of theirs.

    >>> facts = torch.arange(100)[:, None] // 50 == torch.arange(2)
    >>> meanings(torch.tensor([[60, 70, 80, 90, 95, 99, 51, 52, 53], [0, 1, 2, 3, 97, 98, 99, -1, -1]]), facts).tolist()
    [1, -1]
    """
    from scipy.stats import hypergeom

    if facts.ndim != 2 or not facts.numel() or bool((top_rows >= len(facts)).any()):
        raise ConfigError(f"facts: got shape {tuple(facts.shape)}, expected a row for every input, at least one column")
    fires = top_rows >= 0
    found = (facts[top_rows.clamp(min=0)] & fires[:, :, None]).sum(1)
    chance = hypergeom.sf(found.numpy() - 1, len(facts), facts.sum(0).numpy()[None], fires.sum(1).numpy()[:, None])
    least, fact = torch.from_numpy(chance).min(1)
    return torch.where(least * facts.shape[1] < LEVEL, fact, NONE)


def same_meaning(image: Tensor, text: Tensor, edges: BridgeEdges) -> float:
    """Return the fraction of edges whose image concept means among images what the text concept means among captions.

    image and text (C) as of `meanings`; without edges it is NaN.
    """
    left, right = image[edges.image], text[edges.text]
    return float(((left == right) & (left != NONE)).double().mean())
