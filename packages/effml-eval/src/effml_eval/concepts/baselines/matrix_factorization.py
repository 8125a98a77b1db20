"""Matrix factorisation with non-negative codes: semi-NMF (atoms of any sign) and NMF (data and atoms non-negative).

    semi-NMF   Z <- Z * sqrt( (A^+ + Z G^-) / (A^- + Z G^+) ),  A = X D^T,  G = D D^T;   D <- (Z^T Z + r I)^-1 Z^T X
    NMF        Z <- Z * (X D^T) / (Z D D^T),                    D <- D * (Z^T X) / (Z^T Z D)

with M^+ and M^- the positive and negative parts. No update raises |X - Z D|^2 (Ding et al., PAMI 2010; Lee and Seung,
NeurIPS 2000). Codes are dense: to stand on the front at some L0 they are cut to the k largest per row. New rows are
encoded by the same updates of Z with D fixed, a convex problem. FLOPs per sweep: about 6 N C (d + C).
Semi-NMF is one candidate for the linear methods that arXiv 2504.11695 compares with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_eval.concepts.baselines.kmeans import kmeans
from effml_eval.concepts.baselines.linear_dictionary import LinearDictionary, check_fit

__all__ = ["NMF", "SemiNMF", "nmf", "semi_nmf"]

RIDGE = 1e-8
FLOOR = 1e-12  # under denominators; where a factor is 0, multiplication leaves it 0


@dataclass(frozen=True)
class SemiNMF(LinearDictionary):
    """Atoms of any sign, codes >= 0.

    Attributes:
        iterations: sweeps when encoding.
        objective: |X - Z D|^2 per row after every sweep of the fit.
    """

    iterations: int
    objective: tuple[float, ...]

    def encode(self, x: Tensor) -> Tensor:
        """Return codes (N, C) >= 0 of embeddings (N, d)."""
        x = self._checked(x)
        codes = _projections(x, self.dictionary)
        for _ in range(self.iterations):
            codes = _semi_codes(x, codes, self.dictionary)
        return codes


@dataclass(frozen=True)
class NMF(SemiNMF):
    """Atoms >= 0, codes >= 0, of data >= 0."""

    def encode(self, x: Tensor) -> Tensor:
        """Return codes (N, C) >= 0 of data (N, d) >= 0."""
        x = self._checked(x)
        _check_nonnegative(x)
        codes = _projections(x, self.dictionary)
        for _ in range(self.iterations):
            codes = _nonnegative_codes(x, codes, self.dictionary)
        return codes


def semi_nmf(x: Tensor, n_concepts: int, *, iterations: int = 100, generator: torch.Generator | None = None) -> SemiNMF:
    """Factorise embeddings (N, d) as codes >= 0 times atoms, from k-means.

    Args:
        iterations: sweeps.
        generator: of the k-means that it starts from, on the CPU.

    Raises:
        ConfigError: there are fewer different rows than concepts, or something is not finite.
    """
    check_count("iterations", iterations, 1)
    x = check_fit(x, n_concepts, at_most="rows")
    clusters = kmeans(x, n_concepts, iterations=10, generator=generator)
    codes = clusters.encode(x).dense() + 0.2  # as its authors start: no code is stuck at 0
    objective = []
    for _ in range(iterations):
        atoms = _least_squares(codes, x)
        codes = _semi_codes(x, codes, atoms)
        objective.append(_objective(x, codes, atoms))
    atoms = _least_squares(codes, x)
    return SemiNMF(atoms, x.new_zeros(x.shape[1]), iterations, tuple(objective))


def nmf(x: Tensor, n_concepts: int, *, iterations: int = 200, generator: torch.Generator | None = None) -> NMF:
    """Factorise data (N, d) >= 0 as codes >= 0 times atoms >= 0 of norm 1, from random factors.

    Args:
        iterations: sweeps.
        generator: of the factors that it starts from, on the CPU.

    Raises:
        ConfigError: a number is negative or not finite, or there are fewer rows than concepts.
    """
    check_count("iterations", iterations, 1)
    x = check_fit(x, n_concepts, at_most="rows")
    _check_nonnegative(x)
    scale = float((x.mean() / n_concepts).sqrt())

    def draw(*shape: int) -> Tensor:
        return (0.1 + scale * torch.rand(shape, generator=generator, dtype=torch.float64)).to(x)

    codes, atoms = draw(len(x), n_concepts), draw(n_concepts, x.shape[1])
    objective = []
    for _ in range(iterations):
        codes = _nonnegative_codes(x, codes, atoms)
        atoms = atoms * (codes.T @ x) / (codes.T @ codes @ atoms).clamp(min=FLOOR)
        objective.append(_objective(x, codes, atoms))
    norms = torch.linalg.vector_norm(atoms, dim=1, keepdim=True).clamp(min=FLOOR)
    return NMF(atoms / norms, x.new_zeros(x.shape[1]), iterations, tuple(objective))


def _semi_codes(x: Tensor, codes: Tensor, atoms: Tensor) -> Tensor:
    products, gram = x @ atoms.T, atoms @ atoms.T
    above = products.clamp(min=0) + codes @ gram.clamp(max=0).neg()
    below = products.clamp(max=0).neg() + codes @ gram.clamp(min=0)
    return codes * (above / below.clamp(min=FLOOR)).sqrt()


def _nonnegative_codes(x: Tensor, codes: Tensor, atoms: Tensor) -> Tensor:
    return codes * (x @ atoms.T) / (codes @ (atoms @ atoms.T)).clamp(min=FLOOR)


def _least_squares(codes: Tensor, x: Tensor) -> Tensor:
    """Return the atoms of least error for these codes, in float64: the Gram matrix squares the condition."""
    wide = codes.double()
    gram = wide.T @ wide
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) + FLOOR)
    return torch.linalg.solve(gram, wide.T @ x.double()).to(x)


def _projections(x: Tensor, atoms: Tensor) -> Tensor:
    """Return positive codes to start from: projections, and a little where there is none."""
    codes = (x @ atoms.T).clamp(min=0) / atoms.square().sum(1).clamp(min=FLOOR)
    return codes + 0.01 * codes.mean() + FLOOR


def _objective(x: Tensor, codes: Tensor, atoms: Tensor) -> float:
    return float((x - codes @ atoms).square().sum(dtype=torch.float64)) / len(x)


def _check_nonnegative(x: Tensor) -> None:
    if bool((x < 0).any()):
        raise ConfigError(
            f"x: got a smallest value of {float(x.min())}, expected none below 0; semi_nmf takes any sign"
        )
