"""A divergence between generated and real text from feature vectors, after MAUVE.

Features of both sets are scaled to length 1 and put into k clusters together; p and q are the shares of real and of
generated texts per cluster. Mixtures r = w p + (1 - w) q trace a frontier of the two kinds of error,

    ( exp(-c KL(q || r)), exp(-c KL(p || r)) ),   0 < w < 1,

what is generated and not real, and what is real and not generated. The area under it is the score: 1 for equal
histograms, and for disjoint ones c B(c, c + 1), 0.004 at c = 5. It depends on the features, on k and on the number of
texts: compare only what was computed alike. Unlike the paper's code, features are not reduced by PCA first (our own).

Cost: k-means, O(restarts x rounds x n k dim). Source: Pillutla et al., arXiv 2102.01454.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor

__all__ = ["frontier_area", "k_means", "mauve_score"]

ROUNDS = 100  # of k-means at most; it mostly stops long before


def frontier_area(p: Tensor, q: Tensor, *, scaling: float = 5.0, points: int = 25) -> float:
    """Return the area under the divergence frontier of two histograms (k,), which need not be normalised.

    Raises:
        ConfigError: shapes disagree, or a histogram is negative or all zero.

    >>> round(frontier_area(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])), 6)
    1.0
    """
    check_count("points", points, 1)
    if p.ndim != 1 or p.shape != q.shape:
        raise ConfigError(f"q: got shape {tuple(q.shape)}, expected that of p, {tuple(p.shape)}, of one dimension")
    for name, x in (("p", p), ("q", q)):
        if not bool((x >= 0).all()) or not float(x.sum()) > 0:
            raise ConfigError(f"{name}: got negative numbers, NaN or only zeros, expected a histogram")
    p, q = (x.double() / x.double().sum() for x in (p, q))
    weight = torch.linspace(1e-6, 1 - 1e-6, points, dtype=torch.float64, device=p.device)[:, None]
    mixture = weight * p + (1 - weight) * q
    x, y = (torch.exp(-scaling * _kl(histogram, mixture)) for histogram in (q, p))
    # From "all that is real, nothing else" to "all that is generated": x grows with the share of q in the mixture.
    x, y = F.pad(x.flip(0), (1, 1)), F.pad(y.flip(0), (1, 1))
    x[-1] = y[0] = 1.0
    x, order = x.sort(stable=True)
    return float(torch.trapezoid(y[order], x))


def mauve_score(
    real: Tensor,
    generated: Tensor,
    *,
    clusters: int | None = None,
    scaling: float = 5.0,
    restarts: int = 5,
    generator: torch.Generator | None = None,
) -> float:
    """Return the area under the divergence frontier of features real (n, dim) and generated (m, dim), in [0, 1].

    Args:
        clusters: of k-means; None: a tenth of the smaller set, at least 2.
        scaling: c of the frontier.
        restarts: of k-means, of which the tightest clustering is taken.
        generator: of the starts of k-means, on the CPU.

    Raises:
        ConfigError: features are no matrices of equal width and finite entries, or fewer than the clusters.
    """
    for name, x in (("real", real), ("generated", generated)):
        if x.ndim != 2 or len(x) == 0 or x.shape[1] != real.shape[-1] or not bool(x.isfinite().all()):
            raise ConfigError(f"{name}: got shape {tuple(x.shape)}, expected finite features (texts, dim) alike in dim")
    clusters = max(2, round(min(len(real), len(generated)) / 10)) if clusters is None else clusters
    check_count("clusters", clusters, 1)
    features = F.normalize(torch.cat([real, generated]).double(), dim=1)
    labels = k_means(features, clusters, restarts=restarts, generator=generator)
    p, q = (part.bincount(minlength=clusters) for part in labels.split([len(real), len(generated)]))
    return frontier_area(p, q, scaling=scaling)


def k_means(points: Tensor, clusters: int, *, restarts: int = 5, generator: torch.Generator | None = None) -> Tensor:
    """Return the cluster (n,) int64 of each point (n, dim): Lloyd's rounds from k-means++ starts, the best of them.

    Raises:
        ConfigError: there are fewer points than clusters.
    """
    check_count("restarts", restarts, 1)
    if len(points) < clusters:
        raise ConfigError(f"clusters: got {clusters} for {len(points)} points, expected no more than those")
    best, labels = torch.inf, torch.zeros(len(points), dtype=torch.int64, device=points.device)
    for _ in range(restarts):
        centres = _spread_start(points, clusters, generator)
        nearest = None
        for _ in range(ROUNDS):
            distance, now = torch.cdist(points, centres).min(1)
            if nearest is not None and torch.equal(now, nearest):
                break
            nearest = now
            sums = torch.zeros_like(centres).index_add_(0, nearest, points)
            sizes = nearest.bincount(minlength=clusters)[:, None]
            centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)  # an empty cluster stays where it was
        inertia = float(distance.square().sum())
        if inertia < best:
            best, labels = inertia, now
    return labels


def _spread_start(points: Tensor, clusters: int, generator: torch.Generator | None) -> Tensor:
    """Choose starts one after the other, each with a probability proportional to the squared distance to the others."""
    weights = torch.ones(len(points), dtype=torch.float64)
    chosen: list[int] = []
    nearest = torch.full((len(points),), torch.inf, dtype=points.dtype, device=points.device)
    for _ in range(clusters):
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(1))
        weights = nearest.double().cpu()
        if not float(weights.sum()) > 0:  # fewer different points than clusters
            weights = torch.ones_like(weights)
    return points[torch.tensor(chosen, device=points.device)]


def _kl(p: Tensor, mixture: Tensor) -> Tensor:
    """Return KL(p || r) in nats for p (k,) and mixtures r (points, k) that are positive wherever p is."""
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, mixture)).sum(-1)
