"""Independent components: directions of the whitened data whose projections are as far from Gaussian as can be.

    W <- E[g(W y) y^T] - diag(E[g'(W y)]) W,   W <- (W W^T)^{-1/2} W,   g = tanh       on whitened y

FastICA with symmetric decorrelation (Hyvarinen, IEEE TNN 10(3), 1999). Codes are signed; cut to the k largest in
magnitude per row they stand on the front at L0 = k. FLOPs per iteration: 4 N C^2. Memory: N C.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_eval.concepts.baselines.linear_dictionary import LinearDictionary, check_fit
from effml_eval.concepts.baselines.pca import principal_axes

__all__ = ["ICA", "ica"]


@dataclass(frozen=True)
class ICA(LinearDictionary):
    """Mixing directions as atoms; the offset is the mean.

    Attributes:
        unmixing: (C, d), codes of variance 1 from centred embeddings.
        converged: whether the directions came to rest.
    """

    unmixing: Tensor
    converged: bool

    def encode(self, x: Tensor) -> Tensor:
        """Return the signed codes (N, C) of embeddings (N, d)."""
        return (self._checked(x) - self.offset) @ self.unmixing.T


def ica(
    x: Tensor,
    n_concepts: int,
    *,
    iterations: int = 200,
    tolerance: float = 1e-4,
    generator: torch.Generator | None = None,
) -> ICA:
    """Fit independent components to embeddings (N, d), in float64.

    Args:
        n_concepts: at most d.
        iterations: at most.
        tolerance: of 1 - |cos| between a direction and its predecessor.
        generator: of the first directions, on the CPU.

    Raises:
        ConfigError: the data has fewer directions with variance than components, or something is not finite.
    """
    check_count("iterations", iterations, 1)
    check_range("tolerance", tolerance, 0.0)
    x = check_fit(x, n_concepts, at_most="rank")
    mean, axes, variance = principal_axes(x)
    if not float(variance[n_concepts - 1]) > 1e-12 * float(variance[0]):
        raise ConfigError(f"n_concepts: got {n_concepts}, expected no more than the directions in which x varies")
    spread = variance[:n_concepts].sqrt()
    whitening = axes[:n_concepts] / spread[:, None]
    y = (x.double() - mean) @ whitening.T
    rotation = _decorrelated(torch.randn(n_concepts, n_concepts, generator=generator, dtype=torch.float64).to(y))
    converged = False
    for _ in range(iterations):
        g = (y @ rotation.T).tanh()
        update = _decorrelated(g.T @ y / len(y) - (1 - g.square()).mean(0)[:, None] * rotation)
        moved = float((1 - (update * rotation).sum(1).abs()).max())
        rotation = update
        if moved < tolerance:
            converged = True
            break
    mixing = rotation @ (axes[:n_concepts] * spread[:, None])
    return ICA(mixing.to(x), mean.to(x), (rotation @ whitening).to(x), converged)


def _decorrelated(w: Tensor) -> Tensor:
    """Return the orthogonal matrix nearest to w."""
    left, _, right = torch.linalg.svd(w)
    return left @ right
