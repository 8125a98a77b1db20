"""From pre-activations to sparse codes: TopK, BatchTopK and a fixed threshold, on a dense matrix of them.

    TopK       keeps the k largest of max(p, 0) in each row
    BatchTopK  keeps the max(1, floor(k B + 1/2)) largest of max(p, 0) of a batch of B rows: k is the mean of a row and
               may be fractional (arXiv 2412.06410)
    threshold  keeps p > theta: how BatchTopK is evaluated, and ReLU at theta = 0

What is not above 0 is not active, though it be selected: it gets no gradient. Ties between columns of a row fall to the
lowest index; BatchTopK keeps all that equal the least value kept. State: none. These are the plain forms, whose memory
is that of the matrix; `sparse_encode` finds the same codes from `x`, `W` and `b` without it.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from effml_shared import distributed
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError, NonFiniteError
from torch import Tensor

from effml_eval.sae.sparse_codes import SparseCodes

__all__ = ["batch_count", "batch_topk_codes", "kth_largest", "stable_topk", "threshold_codes", "topk_codes"]


def topk_codes(p: Tensor, k: int) -> SparseCodes:
    """Keep the k largest positive entries of each row of pre-activations (..., C), in falling order.

    Raises:
        ConfigError: k is not in 1..C.

    >>> topk_codes(torch.tensor([[3.0, 1.0, 0.0], [0.5, 2.0, 4.0]]), 1).dense()
    tensor([[3., 0., 0.],
            [0., 0., 4.]])
    """
    check_width(k, p)
    flat = p.reshape(-1, p.shape[-1])
    _, indices = stable_topk(flat.detach(), k)
    values = flat.gather(1, indices).relu()
    return SparseCodes(values, indices.masked_fill(values.detach() == 0, 0), p.shape[-1]).reshape(p.shape[:-1])


def batch_topk_codes(p: Tensor, k: float) -> SparseCodes:
    """Keep the `batch_count(k, B)` largest positive entries of pre-activations (..., C); B counts all rows.

    With several processes, B and the order are those of the global batch.

    Raises:
        ConfigError: k is not in (0, C].
        NonFiniteError: p holds NaN or +infinity.

    >>> batch_topk_codes(torch.tensor([[3.0, 1.0, 0.0], [0.5, 2.0, 4.0]]), 1.5).dense()
    tensor([[3., 0., 0.],
            [0., 2., 4.]])
    """
    check_width(k, p)
    flat = p.reshape(-1, p.shape[-1])
    entries = flat.detach()
    least = kth_largest(entries.relu().flatten(), batch_count(k, len(flat)))
    return _kept(p, (entries >= least) & (entries > 0))


def threshold_codes(p: Tensor, threshold: float | Tensor) -> SparseCodes:
    """Keep the positive entries of pre-activations (..., C) above a threshold.

    Raises:
        ConfigError: p has no concept dimension.
        NonFiniteError: p holds NaN.
    """
    check_width(1, p)
    entries = p.detach().reshape(-1, p.shape[-1])
    check_no_nan(entries)
    return _kept(p, (entries > threshold) & (entries > 0))


def _kept(p: Tensor, mask: Tensor) -> SparseCodes:
    flat = p.reshape(mask.shape)
    rows, indices = mask.nonzero(as_tuple=True)
    return SparseCodes.from_entries(rows, indices, flat[rows, indices], (len(flat), flat.shape[1])).reshape(
        p.shape[:-1]
    )


def check_width(k: float, p: Tensor) -> None:
    """Raise a `ConfigError` unless `k` of the last dimension's entries can be kept."""
    if p.ndim == 0 or not 0 < k <= p.shape[-1]:
        raise ConfigError(f"k: got {k} for pre-activations {tuple(p.shape)}, expected a number in (0, n_concepts]")


def check_no_nan(p: Tensor) -> None:
    """Raise a `NonFiniteError` where pre-activations are NaN: compared with a bound, they would count as inactive."""
    if bool(p.isnan().any()):
        raise NonFiniteError("pre-activations: got NaN, expected numbers; the encoder's weights have diverged")


def batch_count(k: float, rows: int) -> int:
    """Return how many entries BatchTopK keeps of this rank's `rows` rows and all other ranks' together."""
    (total,) = distributed.reduce_sum(float(rows))
    return max(1, math.floor(k * total + 0.5))


def stable_topk(p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return values and indices (N, k) of the k largest entries of each row; equal values in the order of indices."""
    check_count("k", k, 1)
    values, indices = p.topk(k, dim=1)
    tied = (p >= values[:, -1:]).sum(1) > k
    if bool(tied.any()):
        everything = p[tied].sort(dim=1, descending=True, stable=True)
        values[tied], indices[tied] = everything.values[:, :k], everything.indices[:, :k]
    indices, order = indices.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, indices.gather(1, order)


def kth_largest(values: Tensor, k: int) -> float:
    """Return the k-th largest of numbers >= 0 over all ranks; 0 where fewer are above 0.

    A positive float's bits, read as an integer, are in the order of the floats: each round counts one digit of 16 bits,
    and one all-reduce of 65,536 counts makes the count global. Two rounds find a float32, exactly.

    Args:
        values: (n,), this rank's own, on which the answer does not otherwise depend.

    Raises:
        NonFiniteError: a number is NaN or infinite, on whichever rank.
    """
    wide = values.dtype == torch.float64
    values = (values if wide else values.float()).abs()  # which clears the sign of -0 and of NaN
    keys = values.contiguous().view(torch.int64 if wide else torch.int32)
    found, rest, infinite = 0, k, 0x7FF0 if wide else 0x7F80  # the first digit of what is not finite, or above
    for shift in (48, 32, 16, 0) if wide else (16, 0):
        counts = torch.bincount((keys >> shift) & 0xFFFF, minlength=1 << 16)
        if distributed.world_size() > 1:
            dist.all_reduce(counts)
        if infinite and bool(counts[infinite:].any()):
            raise NonFiniteError("pre-activations: got NaN or infinity, expected numbers; the weights have diverged")
        infinite = 0  # later digits may be anything
        above = counts.flip(0).cumsum(0)  # entries whose digit is at least 65535, 65534, ...
        if int(above[-1]) < rest:  # met in the first round or never
            return 0.0
        place = int((above < rest).sum())
        rest -= int(above[place - 1]) if place else 0
        digit = 0xFFFF - place
        found = found << 16 | digit
        keys = keys[(keys >> shift) & 0xFFFF == digit]
    kind, real = (torch.int64, torch.float64) if wide else (torch.int32, torch.float32)
    return float(torch.tensor(found, dtype=kind).view(real))
