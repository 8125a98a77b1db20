"""Change embeddings through their concepts: scale or remove some codes, or remove whole directions.

    steer:   x' = x + sum_{i in S} (a_i - 1) z_i d_i        a_i = 0 ablates; the reconstruction error x - z D stays
    without the error:  x' = sum_i a_i z_i d_i (+ offset)
    remove:  x' = (x - U U^T x) / |...|                     U an orthonormal basis of the directions

Only the changed codes are decoded. FLOPs: 2 N d per stored code, or 4 N d q for q directions.
Source: arXiv 2504.11695, section 4, in our reading.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_eval.concepts.code_entries import Codes, check_codes, check_matrix, decode
from effml_eval.concepts.modality import orthonormal
from effml_eval.sae.sparse_codes import SparseCodes

__all__ = ["ablate", "remove_directions", "steer"]


def steer(
    x: Tensor,
    codes: Codes,
    dictionary: Tensor,
    concepts: Tensor | Sequence[int],
    scale: float | Tensor,
    *,
    keep_error: bool = True,
    offset: Tensor | None = None,
) -> Tensor:
    """Return embeddings (N, d) with the codes of some concepts multiplied.

    Args:
        x: embeddings (N, d).
        codes: of x, (N, C).
        dictionary: atoms (C, d).
        concepts: which, indices in [0, C), each once.
        scale: one factor, or one per concept named: 0 ablates, 1 changes nothing.
        keep_error: keep what the dictionary does not explain; otherwise return the changed reconstruction.
        offset: the decoder's bias (d); needed only without the error.

    Raises:
        ConfigError: shapes do not fit, a concept is unknown or named twice, or something is not finite.

    >>> x, codes = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.5]])
    >>> steer(x, codes, torch.eye(2), [1], 0.0), steer(x, codes, torch.eye(2), [1], 0.0, keep_error=False)
    (tensor([[1.0000, 0.5000]]), tensor([[1., 0.]]))
    """
    atoms = check_matrix("dictionary", dictionary)
    x = check_matrix("x", x, columns=atoms.shape[1])
    if check_codes("codes", codes, len(atoms)) != len(x):
        raise ConfigError(f"codes: got another number of rows than the {len(x)} of x, expected one each")
    factors = _factors(concepts, scale, atoms)
    changed = decode(_scaled(codes, factors - 1 if keep_error else factors), atoms)
    if keep_error:
        return x + changed
    return changed if offset is None else changed + offset.to(changed)


def ablate(
    x: Tensor,
    codes: Codes,
    dictionary: Tensor,
    concepts: Tensor | Sequence[int],
    *,
    keep_error: bool = True,
    offset: Tensor | None = None,
) -> Tensor:
    """Return embeddings (N, d) without some concepts: `steer` by 0."""
    return steer(x, codes, dictionary, concepts, 0.0, keep_error=keep_error, offset=offset)


def remove_directions(x: Tensor, directions: Tensor, *, normalize: bool = True) -> Tensor:
    """Return embeddings (N, d) without their part in the span of directions (d) or (q, d).

    Args:
        normalize: give each row norm 1 again; one that lay in the span becomes 0.

    Raises:
        ConfigError: the directions do not fit or depend on each other, or something is not finite.
    """
    x = check_matrix("x", x)
    basis = orthonormal("directions", directions, x.shape[1]).to(x)
    left = x - x @ basis.T @ basis
    return F.normalize(left, dim=1) if normalize else left


def _factors(concepts: Tensor | Sequence[int], scale: float | Tensor, atoms: Tensor) -> Tensor:
    """Return one factor per concept (C), 1 where none is named."""
    listed = concepts.tolist() if isinstance(concepts, Tensor) else concepts
    whole = isinstance(listed, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in listed)
    if not whole or len(set(listed)) < len(listed) or not all(0 <= i < len(atoms) for i in listed):
        got = list(listed)[:8] if isinstance(listed, Sequence) else listed
        raise ConfigError(f"concepts: got {got!r}, expected different indices in [0, {len(atoms)})")
    chosen = torch.tensor(list(listed), dtype=torch.int64, device=atoms.device)
    values = torch.as_tensor(scale, dtype=atoms.dtype, device=atoms.device)
    if values.shape not in ((), chosen.shape) or not bool(values.isfinite().all()):
        raise ConfigError(f"scale: got shape {tuple(values.shape)}, expected a finite number or one per concept named")
    return atoms.new_ones(len(atoms)).index_copy(0, chosen, values.expand(len(chosen)))


def _scaled(codes: Codes, factors: Tensor) -> Codes:
    if isinstance(codes, SparseCodes):
        values = codes.values.detach()
        return SparseCodes(
            values.to(torch.promote_types(values.dtype, factors.dtype)) * factors[codes.indices],
            codes.indices,
            codes.n_concepts,
        )
    return codes.detach().to(torch.promote_types(codes.dtype, factors.dtype)) * factors
