"""The three products of sparse codes with tables of rows: sums by row, sums by concept, and dot products of pairs.

They are what decoding, its gradients and the gradients of a sparse encoder consist of. Each costs 2 N k d FLOPs, where
the dense product of codes (N, C) costs 2 N C d, and reads N k rows of d numbers. Nothing of size (N, k, d) is made:
on the CPU the C kernels serve (`native`), on a GPU those of Triton (`kernels`), else `embedding_bag` and chunks. Sums
by concept sort the entries by concept first (a compressed sparse column form), so that they need no atomic addition and
repeat bit by bit.
State: none. No gradients flow through these functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from effml_eval.sae import kernels, native

__all__ = ["concept_sums", "pair_dots", "weighted_sums"]

_GATHERED = 1 << 23  # elements of the rows that the plain version gathers at once


def weighted_sums(values: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """Return `sum_j values[n, j] * table[indices[n, j]]`, shape (N, d), from codes (N, k) and a table (C, d)."""
    (rows, k), dim = values.shape, table.shape[1]
    if not values.numel():
        return table.new_zeros(rows, dim)
    if native.serves(values, table):
        out, offsets = table.new_empty(rows, dim), torch.arange(0, rows * k + 1, k)
        tensors = (offsets, indices.contiguous(), values.contiguous(), table.contiguous(), out)
        native.run("row_sums", table.dtype, rows, dim, *tensors)
        return out
    if kernels.serves(values, table):
        offsets = torch.arange(0, rows * k + 1, k, device=table.device)
        return kernels.segment_sums(offsets, indices.flatten(), values.flatten(), table)
    return F.embedding_bag(indices, table, per_sample_weights=values.to(table.dtype), mode="sum")


def concept_sums(values: Tensor, indices: Tensor, rows: Tensor, n_concepts: int) -> Tensor:
    """Return `sum over (n, j) with indices[n, j] = i of values[n, j] * rows[n]`, shape (C, d), from rows (N, d)."""
    k, dim = values.shape[1], rows.shape[1]
    if not values.numel():
        return rows.new_zeros(n_concepts, dim)
    if native.serves(values, rows):
        offsets = torch.empty(n_concepts + 1, dtype=torch.int64)
        owners, weights = torch.empty(values.numel(), dtype=torch.int64), values.new_empty(values.numel())
        codes = (indices.contiguous(), values.contiguous())
        native.run("by_concept", rows.dtype, None, len(values), k, n_concepts, *codes, offsets, owners, weights)
        out = native.empty(n_concepts, dim, dtype=rows.dtype)
        native.run("row_sums", rows.dtype, n_concepts, dim, offsets, owners, weights, rows.contiguous(), out)
        return out
    concepts, order = indices.flatten().sort(stable=True)
    offsets = torch.searchsorted(concepts, torch.arange(n_concepts + 1, device=rows.device))
    weights = values.flatten()[order]
    if kernels.serves(values, rows):
        return kernels.segment_sums(offsets, order // k, weights, rows)
    return F.embedding_bag(order // k, rows, offsets[:-1], per_sample_weights=weights.to(rows.dtype), mode="sum")


def pair_dots(left: Tensor, table: Tensor, indices: Tensor, values: Tensor | None = None) -> Tensor:
    """Return `<left[n], table[indices[n, j]]>`, shape (N, k), from rows (N, d) and a table (C, d).

    Args:
        values: (N, k); where it is 0, so is the result, at no cost on the CPU. None: all are computed.
    """
    (rows, k), dim = indices.shape, table.shape[1]
    tensors = (left, table) if values is None else (left, table, values)
    if kernels.serves(*tensors):
        return kernels.pair_dots(left, table, indices, values)
    if native.serves(*tensors):
        out = left.new_empty(rows, k)
        given = None if values is None else values.contiguous()
        inputs = (left.contiguous(), table.contiguous(), indices.contiguous(), given)
        native.run("pair_dots", left.dtype, rows, k, dim, *inputs, out)
        return out
    chunk = max(1, _GATHERED // max(1, k * dim))
    parts = [
        torch.einsum("nd,nkd->nk", x, table[i]) for x, i in zip(left.split(chunk), indices.split(chunk), strict=True)
    ]
    out = torch.cat(parts) if rows else left.new_zeros(0, k)
    return out if values is None else out.masked_fill(values == 0, 0)
