"""How reproducible a dictionary is: mean cosine of its atoms to their partners in another run's dictionary.

    stab(D, D') = max over permutations P of (1/C) sum_i <d_i, d'_P(i)>

Reproducible concepts are the strong ones, so the mean over all atoms hides two populations: `energy_stability` matches
all atoms and then averages over those that carry most energy in run A (subsets of two runs taken by index would be
meaningless). What matching alone yields is the null: the assignment searches for its partners, and finds cosines of
.33 between random dictionaries of 256 atoms in 64 dimensions. Cost: see `matching`.
Source: arXiv 2504.11695, section 4; the nulls are ours.
"""

from __future__ import annotations

import torch
from effml_shared.checks import check_choice, check_count
from torch import Tensor

from effml_eval.concepts.code_entries import check_column, unit_rows
from effml_eval.concepts.energy import top_concepts
from effml_eval.concepts.matching import Matching, match_dictionaries

__all__ = ["energy_stability", "stability", "stability_null"]

NULLS = ("random", "rotation")


def stability(a: Tensor, b: Tensor, *, rectangular: bool = False) -> float:
    """Return the mean cosine of the best one-to-one assignment of atoms a (C, d) to b (C', d), over min(C, C').

    Raises:
        ConfigError: see `match_dictionaries`.

    >>> stability(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    0.0
    """
    return match_dictionaries(a, b, rectangular=rectangular).stability


def energy_stability(matching: Matching, energy: Tensor, top: int) -> float:
    """Return the mean similarity over the `top` atoms of A of most energy (those that have a partner).

    Args:
        matching: of all atoms.
        energy: (C) of the atoms of A, in run A's own codes.
        top: how many. The weakest are `energy_stability(matching, -energy, top)`.

    Raises:
        ConfigError: energies are not one per atom of A, or fewer than `top`.
    """
    chosen = top_concepts(check_column("energy", energy, len(matching.similarity)), top).to(matching.similarity.device)
    return float(matching.similarity[chosen].double().nanmean())


def stability_null(
    a: Tensor,
    b: Tensor,
    *,
    kind: str = "rotation",
    draws: int = 8,
    rectangular: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the stability (draws) float64 that dictionaries of these shapes reach without anything in common.

    Args:
        kind: `"rotation"` turns all of b by a random rotation, which keeps the angles among its atoms; `"random"`
            replaces b by random directions.
        draws: how many.
        generator: of the draws, on the CPU.

    Raises:
        ConfigError: see `match_dictionaries`.
    """
    check_choice("kind", kind, NULLS)
    check_count("draws", draws, 1)
    first, second = unit_rows("a", a), unit_rows("b", b)
    found = []
    for _ in range(draws):
        if kind == "random":
            other = torch.randn(second.shape, generator=generator, dtype=torch.float64)
        else:
            normal = torch.randn(second.shape[1], second.shape[1], generator=generator, dtype=torch.float64)
            q, r = torch.linalg.qr(normal)
            other = second.cpu().double() @ (q * r.diagonal().sign())  # signs make the rotation uniform
        found.append(match_dictionaries(first, other.to(first), rectangular=rectangular).stability)
    return torch.tensor(found, dtype=torch.float64)
