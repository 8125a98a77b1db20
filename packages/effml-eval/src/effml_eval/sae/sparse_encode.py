"""Encode straight to sparse codes: `Pi(x W^T + b)` with Pi one of TopK, BatchTopK or a threshold, and its gradients.

The forward pass finds the active concepts by `selection`, without the matrix of pre-activations. The backward pass
needs x, values and indices only; with g masked where the value is not above 0 (the ReLU),

    db = sum of g by concept    dW[i] = sum over entries of concept i of g x[n]    dx[n] = sum_j g[n, j] W[index[n, j]]

which are `sparse_products`: 2 N k d FLOPs each in place of 2 N C d, and no tensor of size (N, k, d).
State: none. Second derivatives are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor
from torch.autograd.function import once_differentiable

from effml_eval.sae import selection
from effml_eval.sae.sparse_codes import SparseCodes
from effml_eval.sae.sparse_products import concept_sums, weighted_sums
from effml_eval.sae.sparsifiers import check_width

__all__ = ["batch_topk_encode", "encode_at", "threshold_encode", "topk_encode"]


def topk_encode(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> SparseCodes:
    """Return `topk_codes(x @ weight.T + bias, k)`.

    Args:
        x: (..., d), of the weight's dtype.
        weight: (C, d).
        bias: (C,).
        k: concepts kept per row.

    Raises:
        ConfigError: shapes or dtypes do not fit, x is not finite, or k is not in 1..C.
    """
    check_count("k", k, 1)
    return _encode(lambda x, weight, bias: selection.topk(x, weight, bias, k), x, weight, bias, k)


def batch_topk_encode(x: Tensor, weight: Tensor, bias: Tensor, k: float) -> SparseCodes:
    """Return `batch_topk_codes(x @ weight.T + bias, k)`; arguments as for `topk_encode`, k as a mean per row.

    Raises:
        ConfigError: as for `topk_encode`.
        NonFiniteError: a pre-activation is NaN or infinite.
    """
    return _encode(lambda x, weight, bias: selection.batch_topk(x, weight, bias, k), x, weight, bias, k)


def threshold_encode(x: Tensor, weight: Tensor, bias: Tensor, threshold: float) -> SparseCodes:
    """Return `threshold_codes(x @ weight.T + bias, threshold)`; arguments as for `topk_encode`.

    Raises:
        ConfigError: as for `topk_encode`.
        NonFiniteError: a pre-activation is NaN.
    """
    return _encode(lambda x, weight, bias: selection.above_threshold(x, weight, bias, threshold), x, weight, bias, 1)


@torch._disable_dynamo  # its kernels are not traced; torch.compiler.disable would import the compiler, for seconds
def _encode(select: Callable[..., SparseCodes], x: Tensor, weight: Tensor, bias: Tensor, k: float) -> SparseCodes:
    if x.ndim == 0 or weight.ndim != 2 or x.shape[-1] != weight.shape[1] or bias.shape != weight.shape[:1]:
        got = f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
        raise ConfigError(f"x, weight, bias: got shapes {got}, expected (..., d), (C, d) and (C,)")
    if not x.dtype == weight.dtype == bias.dtype:
        raise ConfigError(f"x, weight, bias: got {x.dtype}, {weight.dtype} and {bias.dtype}, expected one dtype")
    check_width(k, bias)
    flat = x.reshape(-1, x.shape[-1])
    if not bool(flat.isfinite().all()):
        raise ConfigError("x: got NaN or infinity, expected finite numbers")
    with torch.no_grad():
        found = select(flat.detach(), weight.detach(), bias.detach())
    values = encode_at(flat, weight, bias, found.values, found.indices)
    return SparseCodes(values, found.indices, len(weight)).reshape(x.shape[:-1])


def encode_at(x: Tensor, weight: Tensor, bias: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Return `values` (N, k), the positive pre-activations that `selection` found at `indices`, with their gradient."""
    return _At.apply(x, weight, bias, values, indices)


class _At(torch.autograd.Function):
    """The pre-activations at given places, whose values are known already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, values, indices)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, values, indices = ctx.saved_tensors
        g = g.masked_fill(values <= 0, 0)
        d_x = weighted_sums(g, indices, weight) if ctx.needs_input_grad[0] else None
        d_weight = concept_sums(g, indices, x, len(weight)) if ctx.needs_input_grad[1] else None
        d_bias = None
        if ctx.needs_input_grad[2]:
            d_bias = concept_sums(g, indices, x.new_ones(len(x), 1), len(weight)).squeeze(1)
        return d_x, d_weight, d_bias, None, None
