"""K-means: one concept per embedding, the nearest centre.

Lloyd's iterations from k-means++ (Arthur and Vassilvitskii, SODA 2007). A centre that loses all its
points moves to the point farthest from its own centre. Codes have L0 = 1: the projection length onto the centre
(clamped at 0), or 1. Cost per iteration: 2 N C d; memory: blocks of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_eval.concepts.baselines.linear_dictionary import LinearDictionary, check_fit
from effml_eval.concepts.code_entries import BLOCK
from effml_eval.sae.sparse_codes import SparseCodes

__all__ = ["KMeans", "kmeans"]

CODES = ("one", "projection")


@dataclass(frozen=True)
class KMeans(LinearDictionary):
    """Centres as atoms.

    Attributes:
        code: `"one"`, or `"projection"` for <x, c> / |c|^2.
        inertia: mean squared distance to the nearest centre, of the data it was fit to.
    """

    code: str
    inertia: float

    def encode(self, x: Tensor) -> SparseCodes:
        """Return the codes of embeddings (N, d), one concept each."""
        x = self._checked(x)
        nearest, _ = _nearest(x, self.dictionary)
        values = x.new_ones(len(x))
        if self.code == "projection":
            centres = self.dictionary[nearest]
            values = (x * centres).sum(1) / centres.square().sum(1).clamp(min=torch.finfo(x.dtype).tiny)
        return SparseCodes(values.clamp(min=0)[:, None], nearest[:, None], len(self.dictionary))


def kmeans(
    x: Tensor, n_concepts: int, *, iterations: int = 50, code: str = "one", generator: torch.Generator | None = None
) -> KMeans:
    """Cluster embeddings (N, d); stops early when no point changes its centre.

    Args:
        iterations: at most.
        code: what `encode` returns for the nearest centre, `"one"` or `"projection"`.
        generator: of the first centres, on the CPU.

    Raises:
        ConfigError: there are fewer different rows than centres, or something is not finite.
    """
    check_choice("code", code, CODES)
    check_count("iterations", iterations, 0)
    x = check_fit(x, n_concepts, at_most="rows")
    origin = x.mean(0)  # distances are differences of squares: without the mean they lose fewer digits
    points = x - origin
    centres = _first_centres(points, n_concepts, generator)
    nearest, distance = _nearest(points, centres)
    for _ in range(iterations):
        sums = torch.zeros_like(centres, dtype=torch.float64).index_add_(0, nearest, points.double())
        counts = nearest.bincount(minlength=n_concepts)
        centres = (sums / counts.clamp(min=1)[:, None]).to(points)
        empty = (counts == 0).nonzero()[:, 0]
        centres[empty] = points[distance.topk(len(empty)).indices]
        before = nearest
        nearest, distance = _nearest(points, centres)
        if not len(empty) and torch.equal(nearest, before):
            break
    return KMeans(centres + origin, torch.zeros_like(origin), code, float(distance.double().mean()))


def _first_centres(x: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Draw points as centres, each with probability proportional to its squared distance from those before."""
    chosen = [int(torch.randint(len(x), (), generator=generator))]
    distance = (x - x[chosen[0]]).square().sum(1).double()
    for _ in range(count - 1):
        ends = distance.cumsum(0)
        if not float(ends[-1]) > 0:
            raise ConfigError(f"n_concepts: got {count} for {len(chosen)} different rows, expected at most as many")
        draw = torch.rand((), generator=generator, dtype=torch.float64).to(ends.device) * ends[-1]
        place = int(torch.searchsorted(ends, draw, right=True).clamp(max=len(x) - 1))
        chosen.append(place)
        distance = torch.minimum(distance, (x - x[place]).square().sum(1).double())
    return x[chosen]


def _nearest(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest centre (N) of every point and the squared distance (N)."""
    norms = centres.square().sum(1)
    size = max(1, BLOCK // len(centres))
    nearest = [(norms - 2 * part @ centres.T).min(1) for part in x.split(size)]
    if not nearest:
        return torch.zeros(0, dtype=torch.int64, device=x.device), x.new_zeros(0)
    indices = torch.cat([part.indices for part in nearest])
    distance = torch.cat([part.values for part in nearest]) + x.square().sum(1)
    return indices, distance.clamp(min=0)
