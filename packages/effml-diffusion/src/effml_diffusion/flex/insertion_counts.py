"""How many masks go into every gap in one step, from what the network expects to be missing there.

With q the probability that a missing token appears in this step and g = E[missing] in a gap,

    poisson      Poisson(q g)                               tau-leaping: exact for ever smaller steps
    bernoulli    1 with probability min(1, q g)             Euler: at most one mask per gap and step
    binomial     n from the head's distribution, then Binomial(n, q): no overshoot, at any step size

What does not fit into a row is dropped: either a uniformly chosen subset of the new masks stays, or none does. All of
it is over the whole batch at once; a subset costs O(new masks), a draw O(gaps) or O(gaps x (most missing + 1)).

Source: arXiv 2509.01025 and its code (Poisson; rows that overflow are left as they were); the binomial thinning, exact
where the gaps' counts are independent, and subsets are our own.
"""

from __future__ import annotations

import torch
from effml_shared.generation import draw
from torch import Tensor

from effml_diffusion.corruption import uniform

__all__ = ["draw_missing", "draw_new", "keep_subset", "poisson", "scatter_masks", "thin"]


def draw_new(expected: Tensor, kind: str, generator: torch.Generator | None = None) -> Tensor:
    """Draw counts (batch, gaps) int64 with these expectations; kind is poisson or bernoulli."""
    if kind == "bernoulli":
        return (uniform(tuple(expected.shape), expected.device, generator) < expected).long()
    return poisson(expected, generator)


def poisson(rate: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw int64 numbers of these expectations, of any shape, where the generator lives."""
    where = rate.device if generator is None else generator.device
    return torch.poisson(rate.double().to(where), generator=generator).long().to(rate.device)


def draw_missing(gap_logits: Tensor, open_gaps: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw how many tokens are missing, (batch, gaps), from gap_logits (batch, gaps, most + 1); 0 in gaps not open."""
    index = open_gaps.flatten().nonzero().squeeze(1)
    drawn = draw(gap_logits.flatten(0, 1)[index], uniform((len(index),), open_gaps.device, generator))
    return torch.zeros_like(open_gaps, dtype=torch.int64).flatten().index_copy(0, index, drawn).view_as(open_gaps)


def thin(counts: Tensor, q: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Keep each of counts, of any shape, with probability q, a scalar: int64, drawn where the generator lives."""
    where = counts.device if generator is None else generator.device
    share = q.double().expand(counts.shape).to(where)
    return torch.binomial(counts.double().to(where), share, generator=generator).long().to(counts.device)


def keep_subset(counts: Tensor, room: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return counts (batch, gaps) of a uniformly chosen subset of at most room (batch,) of what was counted.

    >>> keep_subset(torch.tensor([[2, 0, 3], [0, 1, 0]]), torch.tensor([4, 4])).sum(1).tolist()
    [4, 1]
    """
    counts = torch.where(room[:, None] > 0, counts, 0)
    total = counts.sum(1)
    crowded = (total > room).nonzero().squeeze(1)
    if not len(crowded):
        return counts
    many = total[crowded]
    item = torch.arange(int(many.max()), device=counts.device).expand(len(crowded), -1)
    noise = uniform(tuple(item.shape), counts.device, generator).masked_fill(item >= many[:, None], 2.0)
    kept = noise.argsort(dim=1)[:, : int(room[crowded].max())]  # items in random order, those that exist first
    gap = torch.searchsorted(counts[crowded].cumsum(1), kept.contiguous(), right=True).clamp(max=counts.shape[1] - 1)
    stays = torch.arange(kept.shape[1], device=counts.device) < room[crowded, None]
    smaller = torch.zeros_like(counts[crowded]).scatter_add_(1, gap, stays.long())
    return counts.index_copy(0, crowded, smaller)


def scatter_masks(
    total: Tensor, weights: Tensor, open_gaps: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Put total (batch,) masks into open gaps (batch, gaps), each by weights >= 0 of that shape; evenly if all are 0.

    Rows without an open gap get none.
    """
    most = int(total.max())
    if not most:
        return torch.zeros_like(open_gaps, dtype=torch.int64)
    weights = torch.where(open_gaps, weights.double(), 0.0)
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, open_gaps.double())
    cumulative = weights.cumsum(1)
    number = uniform((len(total), most), total.device, generator) * cumulative[:, -1:]
    gap = torch.searchsorted(cumulative, number, right=True).clamp(max=weights.shape[1] - 1)
    wanted = (torch.arange(most, device=total.device) < total[:, None]) & open_gaps.any(1, keepdim=True)
    return torch.zeros_like(open_gaps, dtype=torch.int64).scatter_add_(1, gap, wanted.long())
