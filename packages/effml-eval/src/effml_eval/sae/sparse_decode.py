"""Decode sparse codes without the dense ones: `x_hat[n] = sum_j values[n, j] * D[indices[n, j]]`, and its gradients.

The gradients are `dvalues[n, j] = <g[n], D[indices[n, j]]>` and `dD[i] = sum over entries of concept i of
values[n, j] * g[n]`: exact, repeatable bit by bit, and 2 N k d FLOPs each, as the forward pass.
State: none; for the backward pass the inputs are kept. Second derivatives are refused.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from effml_shared.errors import ConfigError
from torch import Tensor
from torch.autograd.function import once_differentiable

from effml_eval.sae.sparse_products import concept_sums, pair_dots, weighted_sums

__all__ = ["sparse_decode"]


@torch._disable_dynamo  # its kernels are not traced; torch.compiler.disable would import the compiler, for seconds
def sparse_decode(values: Tensor, indices: Tensor, dictionary: Tensor, *, inert_zeros: bool = False) -> Tensor:
    """Return the reconstruction (..., d) of sparse codes.

    Args:
        values: (..., k), of the dictionary's dtype.
        indices: (..., k) int64 in [0, C). An index may stand several times in a row.
        dictionary: (C, d), one atom per row.
        inert_zeros: entries of value 0 are not stored and get no gradient, as those of a ReLU: saves their work.

    Raises:
        ConfigError: shapes or dtypes do not fit, or an index is out of range.

    >>> atoms = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    >>> sparse_decode(torch.tensor([[2.0, 1.0]]), torch.tensor([[2, 1]]), atoms)
    tensor([[1.2000, 2.6000]])
    """
    if values.shape != indices.shape or values.ndim == 0 or dictionary.ndim != 2:
        got = f"{tuple(values.shape)}, {tuple(indices.shape)} and {tuple(dictionary.shape)}"
        raise ConfigError(f"values, indices, dictionary: got shapes {got}, expected (..., k), (..., k) and (C, d)")
    floating = values.dtype == dictionary.dtype and values.is_floating_point()
    if indices.dtype != torch.int64 or not floating:
        got = f"{values.dtype}, {indices.dtype} and {dictionary.dtype}"
        raise ConfigError(f"values, indices, dictionary: got {got}, expected one floating dtype and int64 indices")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < len(dictionary):
        got = f"{int(indices.min())} to {int(indices.max())}"
        raise ConfigError(f"indices: got {got}, expected integers in [0, {len(dictionary)})")
    shape = (math.prod(values.shape[:-1]), values.shape[-1])
    flat = _SparseDecode.apply(values.reshape(shape), indices.reshape(shape), dictionary, inert_zeros)
    return flat.reshape(*values.shape[:-1], dictionary.shape[1])


class _SparseDecode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, dictionary: Tensor, inert_zeros: bool) -> Tensor:
        ctx.save_for_backward(values, indices, dictionary)
        ctx.inert_zeros = inert_zeros
        return weighted_sums(values, indices, dictionary)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        values, indices, dictionary = ctx.saved_tensors
        d_values = d_dictionary = None
        if ctx.needs_input_grad[0]:
            d_values = pair_dots(g, dictionary, indices, values if ctx.inert_zeros else None)
        if ctx.needs_input_grad[2]:
            d_dictionary = concept_sums(values, indices, g, len(dictionary))
        return d_values, None, d_dictionary, None
