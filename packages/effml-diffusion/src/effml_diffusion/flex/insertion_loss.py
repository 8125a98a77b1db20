"""What it costs to predict g missing tokens in a gap where n are missing.

    phi(n, g) = g - n + n ln(n / g)     trained: >= 0, and 0 iff g = n
    nll(n, g) = g - n - n ln g          in a likelihood bound: minus the log of a Poisson rate's density, up to -n

They differ by n ln n, which no network can change, so both have the gradient 1 - n / g, and the best g is E[n]. The
first is a Bregman divergence; the second sums to a bound in nats that is tight at the best prediction (derived here).
A head that gives a distribution of n is trained by its cross-entropy instead and predicts g = E[n] under it.

Cost: O(gaps). ln g comes from the head, where it can: a g that underflows to 0 has a finite logarithm, and a clamp
would turn the gradient's sign.

Source: arXiv 2509.01025, section 4; formulas of phi in print sometimes have other signs.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["expected_gaps", "insertion_nll", "phi"]


def insertion_nll(n: Tensor, g: Tensor, log_g: Tensor | None = None) -> Tensor:
    """Return g - n - n ln g elementwise, with 0 ln g = 0 even at g = 0; log_g is ln g, if known better than from g.

    >>> insertion_nll(torch.tensor([0, 2]), torch.tensor([0.0, 1.0])).tolist()
    [0.0, -1.0]
    """
    some = n > 0
    if log_g is None:
        log_g = torch.where(some, g, 1.0).log()  # a masked logarithm would still have the gradient of ln 0
    return g - n - n * torch.where(some, log_g, 0.0)


def phi(n: Tensor, g: Tensor, log_g: Tensor | None = None) -> Tensor:
    """Return g - n + n ln(n / g) elementwise, the divergence of g from n.

    >>> phi(torch.tensor([0, 2]), torch.tensor([0.5, 1.0]))
    tensor([0.5000, 0.3863])
    """
    counts = n.to(g.dtype)
    return insertion_nll(n, g, log_g) + torch.special.xlogy(counts, counts)


def expected_gaps(gap_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return E[n] and ln E[n] of gap_logits (..., most + 1) over n = 0 .. most, each (...)."""
    log_probs = gap_logits.log_softmax(-1)
    n = torch.arange(1, gap_logits.shape[-1], device=gap_logits.device, dtype=log_probs.dtype)
    log_g = (log_probs[..., 1:] + n.log()).logsumexp(-1)
    return log_g.exp(), log_g
