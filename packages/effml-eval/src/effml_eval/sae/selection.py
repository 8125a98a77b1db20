"""Find the active concepts of `p = x W^T + b` without the matrix p (N, C): by tiles of concepts, exactly.

Plain form (`tiled_topk`, `tiled_above`): each tile's pre-activations, in the dtype of x, are merged into the k best so
far, or compared with a bound. FLOPs 2 N d C; memory N (tile + 2 k) numbers.

Screened form, on a CPU with the C kernels and in float32: the product is made in bfloat16 where the processor
multiplies that (5 times as fast on one with AVX512-BF16, more with AMX), and serves only to rule concepts out. For
rounded x~ and w~ the exact pre-activation is, by Cauchy and Schwarz, within

    m_n = ||x_n - x~_n|| max_i ||w_i|| + ||x~_n|| max_i ||w_i - w~_i||        (plus the product's own rounding)

of the approximate one, so whatever is 2 m_n or more below the k-th best approximate value cannot be among the k best.
The others, some 60 of 16,384 at k = 32, are computed again in float32, and the k best of those are the codes: the same
as the float32 product's, at 2 N d C FLOPs of bfloat16 and 2 d of float32 per candidate. The bound is derived here.
A row with too many candidates (ties, rows of zeros) is done in the plain form.

State: none, and no gradients: `sparse_encode` adds them.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from effml_shared import distributed
from torch import Tensor

from effml_eval.sae import native
from effml_eval.sae.sparse_codes import SparseCodes
from effml_eval.sae.sparsifiers import batch_count, check_no_nan, kth_largest, stable_topk

__all__ = ["above_threshold", "batch_topk", "tiled_above", "tiled_topk", "topk"]

_TILE = 2048  # concepts whose approximate pre-activations exist at once
_SAMPLED = 64  # rows from which BatchTopK's bound is guessed
_HALF_ULP, _SINGLE = 2.0**-8, 2.0**-23  # of bfloat16; of float32, with a factor 2 to spare


def topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> SparseCodes:
    """Return the k largest positive pre-activations of each row of x (N, d), falling; weight (C, d), bias (C,)."""
    if not _screens(x, weight, bias):
        return tiled_topk(x, weight, bias, k)
    counts, candidates = _Screen.of(x, weight, bias).search(0.0, k, room=min(3 * k + 512, len(weight) + 64))
    codes = _unpacked(counts, candidates, k, len(weight))
    lost = (counts < 0).nonzero().flatten()
    if len(lost):
        rest = tiled_topk(x[lost], weight, bias, k)
        codes.values[lost], codes.indices[lost] = rest.values, rest.indices
    return codes


def above_threshold(x: Tensor, weight: Tensor, bias: Tensor, threshold: float) -> SparseCodes:
    """Return all positive pre-activations above a threshold, in the order of concepts."""
    screen = _Screen.of(x, weight, bias) if _screens(x, weight, bias) else None
    return _above(x, weight, bias, max(threshold, 0.0), screen)


def batch_topk(x: Tensor, weight: Tensor, bias: Tensor, k: float) -> SparseCodes:
    """Return the `batch_count(k, N)` largest positive pre-activations of all rows, in the order of concepts.

    A bound is guessed from some rows. What is above it is collected and counted; where that is too little, the bound is
    lowered and the work repeated, so that the guess decides on speed alone. It falls by 2, 4, 16, 256, ...: some ten
    rounds reach 0 from any float, whatever the scale of the rows.

    Raises:
        NonFiniteError: a pre-activation is NaN or infinite.
    """
    wanted = batch_count(k, len(x))
    screen = _Screen.of(x, weight, bias) if _screens(x, weight, bias) else None
    few = slice(None, None, max(1, len(x) // _SAMPLED))
    p = x[few] @ weight.T if screen is None else screen.rounded_x[few] @ screen.rounded_weight.T
    (sampled,) = distributed.reduce_sum(float(len(p)))
    bound = kth_largest((p + bias).relu().flatten(), math.ceil(1.15 * k * sampled) + 8)
    factor = 2.0
    while True:
        codes = _above(x, weight, bias, bound, screen)
        least = kth_largest(codes.values.flatten(), wanted)
        if least > 0:
            return _at_least(codes, least)
        if bound == 0:  # all that is positive is less than wanted
            return codes
        bound = bound / factor if bound > 1e-30 else 0.0
        factor = min(factor**2, 1e60)


def _above(x: Tensor, weight: Tensor, bias: Tensor, threshold: float, screen: _Screen | None) -> SparseCodes:
    if screen is not None:
        least = float(torch.tensor(threshold).nextafter(torch.tensor(math.inf)))
        counts, candidates = screen.search(least, 0, room=min(1024, len(weight) + 64))
        if not bool((counts < 0).any()):
            return _unpacked(counts, candidates, int(counts.max()), len(weight))
    return tiled_above(x, weight, bias, threshold)


def _at_least(codes: SparseCodes, least: float) -> SparseCodes:
    """Keep the entries at or above a positive bound, in their order."""
    kept = codes.values >= least
    rows, k = kept.shape
    if native.serves(codes.values):
        width = int(kept.sum(1).max()) if rows else 0
        values, indices = codes.values.new_empty(rows, width), codes.indices.new_empty(rows, width)
        tensors = (codes.values, codes.indices, values, indices)
        native.run("keep_at_least", values.dtype, rows, k, width, least, *tensors)
        return SparseCodes(values, indices, codes.n_concepts)
    rows_kept, places = kept.nonzero(as_tuple=True)
    entries = (rows_kept, codes.indices[rows_kept, places], codes.values[rows_kept, places])
    return SparseCodes.from_entries(*entries, (rows, codes.n_concepts))


def tiled_topk(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> SparseCodes:
    """Do what `topk` does, on any device and in any floating dtype."""
    values = indices = None
    for first in range(0, len(weight), max(_TILE, k)):
        p = _tile(x, weight, bias, first, max(_TILE, k))
        tile, places = stable_topk(p, min(k, p.shape[1]))
        places = places + first
        if values is None or indices is None:
            values, indices = tile, places
            continue
        # Earlier candidates come first, so a stable order lets the lower concept win.
        values, order = torch.cat([values, tile], 1).sort(dim=1, descending=True, stable=True)
        values, indices = values[:, :k], torch.cat([indices, places], 1).gather(1, order[:, :k])
    assert values is not None
    assert indices is not None
    values = values.relu()
    return SparseCodes(values, indices.masked_fill(values == 0, 0), len(weight))


def tiled_above(x: Tensor, weight: Tensor, bias: Tensor, threshold: float) -> SparseCodes:
    """Do what `above_threshold` does, on any device and in any floating dtype."""
    found = []
    for first in range(0, len(weight), _TILE):
        p = _tile(x, weight, bias, first, _TILE)
        check_no_nan(p)
        rows, places = (p > threshold).nonzero(as_tuple=True)
        found.append((rows, places + first, p[rows, places]))
    rows, indices, values = (torch.cat(parts) for parts in zip(*found, strict=True))
    rows, order = rows.sort(stable=True)
    return SparseCodes.from_entries(rows, indices[order], values[order], (len(x), len(weight)))


def _tile(x: Tensor, weight: Tensor, bias: Tensor, first: int, width: int) -> Tensor:
    return torch.addmm(bias[first : first + width], x, weight[first : first + width].T)


def _screens(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    return x.dtype == torch.float32 and len(x) > 0 and len(weight) < 1 << 32 and native.serves(x, weight, bias)


@cache
def _multiplies_bfloat16() -> bool:
    """Say whether the CPU has instructions for products of bfloat16, so that they cost less than float32."""
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class _Screen(NamedTuple):
    """x, W and b as the product takes them, and how far its results may be off."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    rounded_x: Tensor
    rounded_weight: Tensor
    margins: Tensor  # (N,)
    relative: float  # of the approximate value itself

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, bias: Tensor) -> _Screen:
        x, weight, bias = (tensor.detach().contiguous() for tensor in (x, weight, bias))
        (rounded_x, norm_x, lost_x), (rounded_w, norm_w, lost_w) = _narrowed(x), _narrowed(weight)
        rounding = x.shape[1] * _SINGLE * norm_x * norm_w.max()
        if not _multiplies_bfloat16():
            return cls(x, weight, bias, x, weight, 1.01 * rounding + 1e-30, 0.0)
        off = lost_x * norm_w.max() + (norm_x + lost_x) * lost_w.max() + _HALF_ULP * bias.abs().max()
        return cls(x, weight, bias, rounded_x, rounded_w, 1.01 * (off + rounding) + 1e-30, _HALF_ULP)

    def search(self, least: float, k: int, room: int) -> tuple[Tensor, Tensor]:
        """Return how many candidates each row has, -1 where there was no room, and the candidates (N, room), settled.

        Args:
            least: only values at or above it are asked for, and only those above 0.
            k: with k > 0, only the k largest of a row.
        """
        rows, concepts = len(self.x), len(self.weight)
        if not bool(self.margins.isfinite().all() and self.bias.isfinite().all()):  # the plain form shows them
            return torch.full((rows,), -1), torch.empty(rows, 0, dtype=torch.int64)
        # A value v is at most v + relative |v| + margin; below the bound it cannot reach `least`, or be positive.
        bounds = least * (1 - 2 * self.relative) - self.margins
        counts, candidates = torch.zeros(rows, dtype=torch.int64), native.empty(rows, room, dtype=torch.int64)
        wide, buffer = int(self.relative == 0), native.empty(rows * _TILE, dtype=self.rounded_x.dtype)
        run = torch.float32
        for first in range(0, concepts, _TILE):
            part = self.rounded_weight[first : first + _TILE]
            width = len(part)
            tile = torch.mm(self.rounded_x, part.T, out=buffer[: rows * width].view(rows, width))
            bias = self.bias[first : first + width]
            native.run("collect", run, rows, width, first, k, room, wide, tile, bias, self.margins, self.relative,
                       bounds, counts, candidates)  # fmt: skip
        native.run("settle", run, rows, self.x.shape[1], k, room, least, self.x, self.weight, self.bias, self.margins,
                   self.relative, bounds, counts, candidates)  # fmt: skip
        return counts, candidates


def _narrowed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a float32 matrix in bfloat16, the norms of its rows, and those of what rounding took away."""
    rows, dim = x.shape
    out, norms, lost = native.empty(rows, dim, dtype=torch.bfloat16), x.new_empty(rows), x.new_empty(rows)
    native.run("narrow", torch.float32, rows, dim, x, out, norms, lost)
    return out, norms, lost


def _unpacked(counts: Tensor, candidates: Tensor, width: int, n_concepts: int) -> SparseCodes:
    rows, room = candidates.shape
    values, indices = torch.empty(rows, width), torch.empty(rows, width, dtype=torch.int64)
    native.run("unpack", torch.float32, rows, width, room, counts, candidates, values, indices)
    return SparseCodes(values, indices, n_concepts)
