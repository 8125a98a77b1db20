"""The products of sparse codes on a GPU, through Triton: no tensor of size (N, k, d) and no atomic addition.

    segment_sums   a program owns a segment's sum and some of its channels: with a segment per row of the codes, the
                   reconstruction; with one per concept, the gradient of a dictionary or an encoder
    pair_dots      a program owns some entries of a row: the gradient of the codes

What a program owns nobody else writes, so two runs are equal bit by bit. Tables are float32, bfloat16 or float16 and
sums are float32; other tensors are left to the plain versions, in `sparse_products`. Cost: 2 FLOPs and the bytes of one
number of the table per entry and channel; entries of value 0 are not read. A concept that is active in all rows is one
program's work, so that such a concept bounds the time of its gradient.
Unmeasured: no GPU was at hand when this was written. The numerics were checked with Triton's interpreter, which tests
marked `gpu` repeat on a device; both compile for compute capability 8.0 and 9.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU wheels of torch come without it
    triton = None

__all__ = ["pair_dots", "segment_sums", "serves"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CHANNELS = 256  # of a block of the table
_ENTRIES = 8  # rows of the table that are read at once


def serves(*tensors: Tensor) -> bool:
    """Say whether the kernels take these tensors: plain ones on one GPU, of types they know."""
    known = all(type(t) in (Tensor, torch.nn.Parameter) and t.is_cuda and t.dtype in _DTYPES for t in tensors)
    return triton is not None and known


if triton is not None:

    @triton.jit
    def _segment_sums_kernel(  # type: ignore[no-untyped-def]
        offsets_ptr, rows_ptr, weights_ptr, table_ptr, out_ptr, dim, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr
    ):
        segment = tl.program_id(0).to(tl.int64)
        channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        stop = tl.load(offsets_ptr + segment + 1)
        total = tl.zeros((ENTRIES, CHANNELS), dtype=tl.float32)
        for first in range(tl.load(offsets_ptr + segment), stop, ENTRIES):
            entry = first + tl.arange(0, ENTRIES)
            row = tl.load(rows_ptr + entry, mask=entry < stop, other=0)
            weight = tl.load(weights_ptr + entry, mask=entry < stop, other=0.0).to(tl.float32)
            inside = (weight != 0)[:, None] & (channel < dim)[None, :]
            block = tl.load(table_ptr + row[:, None] * dim + channel[None, :], mask=inside, other=0.0)
            total += weight[:, None] * block.to(tl.float32)
        out = tl.sum(total, axis=0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + segment * dim + channel, out, mask=channel < dim)

    @triton.jit
    def _pair_dots_kernel(  # type: ignore[no-untyped-def]
        left_ptr, table_ptr, indices_ptr, values_ptr, out_ptr, k, dim, ENTRIES: tl.constexpr, CHANNELS: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
        active = entry < k
        if values_ptr is not None:
            active &= tl.load(values_ptr + row * k + entry, mask=entry < k, other=0.0) != 0
        index = tl.load(indices_ptr + row * k + entry, mask=active, other=0)
        total = tl.zeros((ENTRIES, CHANNELS), dtype=tl.float32)
        for first in range(0, dim, CHANNELS):
            channel = first + tl.arange(0, CHANNELS)
            left = tl.load(left_ptr + row * dim + channel, mask=channel < dim, other=0.0).to(tl.float32)
            inside = active[:, None] & (channel < dim)[None, :]
            block = tl.load(table_ptr + index[:, None] * dim + channel[None, :], mask=inside, other=0.0)
            total += left[None, :] * block.to(tl.float32)
        out = tl.where(active, tl.sum(total, axis=1), 0.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * k + entry, out, mask=entry < k)


def segment_sums(offsets: Tensor, rows: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """Return the sums over `e` in `offsets[i] .. offsets[i + 1] - 1` of `weights[e] * table[rows[e]]`, shape (S, d).

    Args:
        offsets: (S + 1,) int64, rising.
        rows: (entries,) int64.
        weights: (entries,).
        table: (T, d), whose dtype the result has.
    """
    segments, dim = len(offsets) - 1, table.shape[1]
    out = table.new_empty(segments, dim)
    if not out.numel():
        return out
    channels = min(_CHANNELS, triton.next_power_of_2(dim))
    tensors = (offsets.contiguous(), rows.contiguous(), weights.contiguous(), table.contiguous(), out)
    with torch.cuda.device_of(out):  # where there are several, a kernel starts on the current one
        _segment_sums_kernel[segments, triton.cdiv(dim, channels)](*tensors, dim, _ENTRIES, channels)
    return out


def pair_dots(left: Tensor, table: Tensor, indices: Tensor, values: Tensor | None = None) -> Tensor:
    """Do what `effml_eval.sae.sparse_products.pair_dots` does."""
    (rows, k), dim = indices.shape, table.shape[1]
    out = left.new_empty(rows, k)
    if not out.numel():
        return out
    channels = min(_CHANNELS, triton.next_power_of_2(max(1, dim)))
    given = None if values is None else values.contiguous()
    tensors = (left.contiguous(), table.contiguous(), indices.contiguous(), given, out)
    with torch.cuda.device_of(out):
        _pair_dots_kernel[rows, triton.cdiv(k, _ENTRIES)](*tensors, k, dim, _ENTRIES, channels)
    return out
