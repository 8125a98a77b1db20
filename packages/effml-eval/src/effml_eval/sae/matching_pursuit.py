"""Matching pursuit: codes without an encoder, by taking away the best atom k times.

`r = x`; k times: `i = argmax_i <r, d_i>` (ties: the lowest), `a = max(<r, d_i>, 0)`, `z_i += a`, `r -= a d_i`, with
atoms of unit norm (Mallat and Zhang 1993, restricted to positive coefficients). Then `||r||^2` falls by `a^2` in each
round. Gradients flow through the coefficients and the atoms taken, not through the choice.
State: none. Cost: 2 N d C FLOPs a round, k times an encoder's; the products are made in tiles of concepts, so that
memory is N (tile + k) numbers.
"""

from __future__ import annotations

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError, NonFiniteError
from torch import Tensor

from effml_eval.sae.sparse_codes import SparseCodes

__all__ = ["matching_pursuit"]

_TILE = 4096  # concepts whose products exist at once


def matching_pursuit(x: Tensor, dictionary: Tensor, k: int) -> SparseCodes:
    """Return codes of k rounds of matching pursuit; an atom that is taken twice stands twice, and its values add up.

    Args:
        x: (..., d).
        dictionary: (C, d), rows of unit norm.
        k: rounds.

    Raises:
        ConfigError: dimensions do not fit, a row is not finite, or atoms do not have unit norm (to 1e-3, in bfloat16
            1.6e-2).
        NonFiniteError: an atom holds NaN or infinity, as after a divergence.

    >>> atoms = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    >>> matching_pursuit(torch.tensor([1.0, 1.0]), atoms, 2).dense()
    tensor([0.1600, 0.0000, 1.4000])
    """
    check_count("k", k, 1)
    if dictionary.ndim != 2 or x.ndim == 0 or x.shape[-1] != dictionary.shape[1] or not len(dictionary):
        got = f"{tuple(x.shape)} and {tuple(dictionary.shape)}"
        raise ConfigError(f"x, dictionary: got shapes {got}, expected (..., d) and (C, d)")
    norms = dictionary.detach().norm(dim=1, dtype=torch.promote_types(dictionary.dtype, torch.float32))
    if not bool(x.detach().isfinite().all()):
        raise ConfigError("x: got NaN or infinity, expected finite numbers")
    if not bool(norms.isfinite().all()):
        raise NonFiniteError("dictionary: got NaN or infinity, expected finite numbers; the atoms have diverged")
    if not bool(((norms - 1).abs() <= max(1e-3, 2 * torch.finfo(dictionary.dtype).eps)).all()):
        raise ConfigError(
            f"dictionary: got atoms of norm {float(norms.min()):.4g} to {float(norms.max()):.4g}, expected unit norm"
        )
    residual = x.reshape(-1, x.shape[-1])
    values, indices = [], []
    for _ in range(k):
        best = _best_atom(residual.detach(), dictionary.detach())
        atoms = dictionary[best]
        value = (residual * atoms).sum(1).relu()
        residual = residual - value[:, None] * atoms
        values.append(value)
        indices.append(best)
    stacked = torch.stack(values, 1)
    places = torch.stack(indices, 1).masked_fill(stacked.detach() == 0, 0)
    return SparseCodes(stacked, places, len(dictionary)).reshape(x.shape[:-1])


def _best_atom(residual: Tensor, dictionary: Tensor) -> Tensor:
    """Return the index (N,) of the atom that has the largest product with each row, the lowest of equals."""
    best = residual.new_full((len(residual),), -torch.inf)
    index = torch.zeros(len(residual), dtype=torch.int64, device=residual.device)
    for first in range(0, len(dictionary), _TILE):
        value, place = (residual @ dictionary[first : first + _TILE].T).max(1)
        better = value > best
        best, index = torch.where(better, value, best), torch.where(better, place + first, index)
    return index
