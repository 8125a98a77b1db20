"""Which modality a concept belongs to, and where the modality axis of the space lies.

    M_i = E_i^image / (E_i^image + E_i^text)     1: fires on images only, 0: on text only, NaN: on neither
    u   = (mean image - mean text) / |...|       the axis;  a_i = |<d_i, u>| / |d_i| how far an atom lies along it

Both halves of the finding of arXiv 2504.11695 are read from these: most concepts fire for one modality, yet most atoms
are nearly orthogonal to the axis. How that paper builds its axis could not be read; besides the difference of means
there are the normal of a linear probe and, for more than two modalities, the subspace of their means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_eval.concepts.code_entries import check_column, check_matrix, unit_rows

__all__ = [
    "ModalityHistogram",
    "modality_alignment",
    "modality_direction",
    "modality_histogram",
    "modality_score",
    "modality_subspace",
]

PROBE_RIDGE = 1e-4  # of the within-modality variance per dimension, so that fewer rows than dimensions have a probe


class ModalityHistogram(NamedTuple):
    """Fractions (bins) float64 of what has a score, and the edges (bins + 1) of the bins over [0, 1]."""

    fractions: Tensor
    edges: Tensor


def modality_score(image_energy: Tensor, text_energy: Tensor) -> Tensor:
    """Return M_i of energies (C) by modality, (C) float64; NaN for concepts without energy.

    Raises:
        ConfigError: shapes differ, or an energy is negative or not finite.

    >>> modality_score(torch.tensor([3.0, 0.0, 0.0]), torch.tensor([1.0, 2.0, 0.0]))
    tensor([0.7500, 0.0000,    nan], dtype=torch.float64)
    """
    image = check_column("image_energy", image_energy)
    text = check_column("text_energy", text_energy, len(image))
    for name, value in (("image_energy", image), ("text_energy", text)):
        if bool((value < 0).any()):
            raise ConfigError(f"{name}: got a smallest value of {float(value.min())}, expected energies >= 0")
    return image / (image + text)


def modality_histogram(score: Tensor, *, bins: int = 20, weights: Tensor | None = None) -> ModalityHistogram:
    """Count concepts by modality score, or their energies.

    Args:
        score: (C), NaN where a concept has none; those are left out.
        bins: of equal width over [0, 1]; the last one holds 1 too.
        weights: (C), such as balanced energies; None counts concepts.

    Raises:
        ConfigError: a score is outside [0, 1], or weights have another shape.
    """
    check_count("bins", bins, 1)
    score = check_column("score", score, nan=True)
    weights = torch.ones_like(score) if weights is None else check_column("weights", weights, len(score))
    known = ~score.isnan()
    values = score[known]
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ConfigError(f"score: got values from {float(values.min())} to {float(values.max())}, expected [0, 1]")
    places = (values * bins).long().clamp(max=bins - 1)
    mass = torch.zeros(bins, dtype=torch.float64, device=score.device).index_add_(0, places, weights[known])
    return ModalityHistogram(mass / mass.sum(), torch.linspace(0, 1, bins + 1, dtype=torch.float64))


def modality_direction(image: Tensor, text: Tensor, *, method: str = "means") -> Tensor:
    """Return the unit vector (d) that points from text to images.

    Args:
        image: embeddings (N, d).
        text: embeddings (M, d).
        method: `"means"`, the difference of means; `"probe"`, the normal of the linear classifier of least squares
            (Fisher's), which discounts dimensions that vary within a modality. FLOPs: 2 (N + M) d^2.

    Raises:
        ConfigError: shapes do not fit, a set is empty, or the means coincide.
    """
    check_choice("method", method, ("means", "probe"))
    image, text = _embeddings("image", image), _embeddings("text", text, image.shape[1])
    difference = image.mean(0) - text.mean(0)
    if method == "probe":
        within = _scatter(image) + _scatter(text)
        ridge = PROBE_RIDGE * within.diagonal().mean()
        within.diagonal().add_(ridge if ridge > 0 else 1.0)
        difference = torch.linalg.solve(within, difference)
    norm = torch.linalg.vector_norm(difference)
    if not float(norm) > 0:
        raise ConfigError("image, text: got two sets of one mean, expected a difference to point along")
    return (difference / norm).to(image.dtype)


def modality_subspace(groups: Sequence[Tensor], rank: int | None = None) -> Tensor:
    """Return an orthonormal basis (rank, d) of where the means of several modalities differ, largest spread first.

    Args:
        groups: embeddings (N_m, d) of at least two modalities.
        rank: at most one less than modalities, which is the default.

    Raises:
        ConfigError: shapes do not fit, or the means span fewer directions.
    """
    if len(groups) < 2:
        raise ConfigError(f"groups: got {len(groups)}, expected the embeddings of at least two modalities")
    rank = len(groups) - 1 if rank is None else rank
    check_count("rank", rank, 1)
    width = check_matrix("groups[0]", groups[0]).shape[1]
    means = torch.stack([_embeddings(f"groups[{i}]", group, width).mean(0) for i, group in enumerate(groups)])
    means = means - means.mean(0)
    _, sizes, basis = torch.linalg.svd(means, full_matrices=False)
    spanned = int((sizes > sizes[0] * 1e-6).sum()) if float(sizes[0]) > 0 else 0
    if rank > spanned:
        raise ConfigError(f"rank: got {rank}, expected at most {spanned}, in which the means of the groups differ")
    return basis[:rank]


def modality_alignment(dictionary: Tensor, directions: Tensor) -> Tensor:
    """Return how far each atom lies in the modality subspace, (C) in [0, 1]: |cos| to one direction.

    Args:
        dictionary: atoms (C, d) of any norm but 0.
        directions: (d), or (q, d) of which the span counts.

    Raises:
        ConfigError: an atom is 0, or the directions do not fit or depend on each other.
    """
    atoms = unit_rows("dictionary", dictionary)
    basis = orthonormal("directions", directions, atoms.shape[1]).to(atoms)
    return torch.linalg.vector_norm(atoms @ basis.T, dim=1).clamp(max=1.0)


def orthonormal(name: str, directions: Tensor, width: int) -> Tensor:
    """Return an orthonormal basis (q, d) of the span of directions (d) or (q, d).

    Raises:
        ConfigError: they do not fit or depend on each other.
    """
    single = isinstance(directions, Tensor) and directions.ndim == 1
    rows = check_matrix(name, directions[None] if single else directions, columns=width)
    if not 0 < len(rows) <= width:
        raise ConfigError(f"{name}: got {len(rows)} vectors, expected 1 to {width}")
    q, r = torch.linalg.qr(unit_rows(name, rows).T)
    if bool((r.diagonal().abs() < 1e-5).any()):
        raise ConfigError(f"{name}: got vectors that depend on each other, expected independent ones")
    return q.T


def _embeddings(name: str, x: Tensor, width: int | None = None) -> Tensor:
    x = check_matrix(name, x, columns=width)
    if not len(x):
        raise ConfigError(f"{name}: got no rows, expected at least one")
    return x


def _scatter(x: Tensor) -> Tensor:
    """Return the covariance (d, d) about the mean, in the type of x."""
    x = x - x.mean(0)
    return x.T @ x / len(x)
