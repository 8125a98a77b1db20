"""Relaxed archetypal dictionary: atoms that stay near convex combinations of given points.

`D = s (A Y + Lambda)` with frozen points Y (M, d), row-stochastic A (C, M), a relaxation `||Lambda_i|| <= delta` and a
learnt scale `s = exp(mu)` (arXiv 2502.12892). At delta = 0 and s = 1 every atom is in the convex hull of the points.
Atoms do not have unit norm. State: A, Lambda and mu are parameters, Y and delta are not trained. Cost: the product A Y,
2 C M d FLOPs, once per forward pass; the projection touches A and Lambda once.
"""

from __future__ import annotations

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor, nn

__all__ = ["ArchetypalDictionary"]


class ArchetypalDictionary(nn.Module):
    """A dictionary (C, d) for any encoder; after each optimizer step, call `project_`.

    Args:
        points: Y (M, d): data or centres of k-means, one per row.
        n_concepts: C.
        delta: how far an atom may stand off the hull, in units of the points.

    Raises:
        ConfigError: points that are not a finite (M, d), M >= 1; delta < 0.

    >>> ArchetypalDictionary(torch.eye(2), 3)()
    tensor([[1., 0.],
            [0., 1.],
            [1., 0.]], grad_fn=<MulBackward0>)
    """

    points: Tensor

    def __init__(self, points: Tensor, n_concepts: int, *, delta: float = 1.0) -> None:
        super().__init__()
        check_count("n_concepts", n_concepts, 1)
        if points.ndim != 2 or not points.numel() or not bool(points.isfinite().all()):
            raise ConfigError(f"points: got shape {tuple(points.shape)}, expected finite numbers (M, d)")
        if not 0 <= delta < float("inf"):
            raise ConfigError(f"delta: got {delta}, expected a number >= 0")
        self.delta = delta
        self.register_buffer("points", points.detach().clone())
        weights = points.new_zeros(n_concepts, len(points))
        weights[torch.arange(n_concepts), torch.arange(n_concepts) % len(points)] = 1.0
        self.weights = nn.Parameter(weights)
        self.relaxation = nn.Parameter(points.new_zeros(n_concepts, points.shape[1]))
        self.log_scale = nn.Parameter(points.new_zeros(()))

    def forward(self) -> Tensor:
        """Return the atoms (C, d)."""
        return self.log_scale.exp() * (self.weights @ self.points + self.relaxation)

    @torch.no_grad()
    def project_(self) -> None:
        """Make A row-stochastic again and shorten Lambda; a row of A with no positive entry becomes one-hot."""
        positive = self.weights.relu()
        sums = positive.sum(1, keepdim=True)
        largest = torch.zeros_like(positive).scatter_(1, self.weights.argmax(1, keepdim=True), 1.0)
        self.weights.copy_(torch.where(sums > 0, positive / sums.clamp_min(torch.finfo(sums.dtype).tiny), largest))
        norms = self.relaxation.norm(dim=1, keepdim=True)
        self.relaxation.mul_(torch.where(norms > self.delta, self.delta / norms, torch.ones_like(norms)))
