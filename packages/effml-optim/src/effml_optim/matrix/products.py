"""Matrix products of stacks, by the fastest exact routine that torch ships for the operands.

On a CPU torch sends float32 products to its BLAS, which on many machines reaches half of what oneDNN, shipped beside
it, does with the same accuracy (2 AMD Zen 5 cores, 768 x 768: 200 against 450 GFLOP/s). One large float32 product
therefore goes to oneDNN where the CPU has AVX-512; small ones, stacks of them, other dtypes and devices go to
`torch.bmm`, which for bfloat16 is oneDNN already.

oneDNN wants the left operand in rows. Where it stands in columns (Q^T G), the cheaper of two copies is made: the left
operand, or the right one and the result of the transposed product.

State: none. Cost of (m x k)(k x n): 2 mkn FLOPs; the copy is at most mk elements.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["average_gram_", "matmul"]

WORTHWHILE = 1 << 22  # multiplications below which the overhead of either path decides
LEAF = 256  # size at which halving a Gram matrix stops paying


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply (bucket, m, k) by (bucket, k, n), matrix by matrix, in their own dtype.

    >>> a, b = torch.randn(1, 3, 4), torch.randn(1, 4, 5)
    >>> torch.equal(matmul(a, b), torch.bmm(a, b))
    True
    """
    (bucket, m, k), n = a.shape, b.shape[-1]
    if bucket > 1 or m * k * n < WORTHWHILE or a.dtype != torch.float32 or not _onednn_is_faster(a.device.type):
        return torch.bmm(a, b)
    left, right = a[0], b[0]
    if not left.is_contiguous() and k * n + m * n < m * k:
        return _onednn(right.mT.contiguous(), left.mT).mT.contiguous()[None]
    return _onednn(left.contiguous(), right)[None]


def average_gram_(average: Tensor, x: Tensor, beta: float, alpha: float) -> Tensor:
    """Add a Gram matrix in place: beta * average + alpha * x x^T, computing what symmetry leaves to compute.

    On a CPU the lower left quarter of a large matrix is copied to the upper right, in each half again: 0.63 of the
    FLOPs for four blocks a side. A GPU does it in one kernel.

    Args:
        average: (bucket, n, n), symmetric, changed in place.
        x: (bucket, n, k), of the same dtype, or bfloat16 for products in bfloat16.
    """
    n = x.shape[1]
    if x.device.type == "cpu" and n >= 2 * LEAF:
        x, half = x.contiguous(), n // 2
        average_gram_(average[:, :half, :half], x[:, :half], beta, alpha)
        average_gram_(average[:, half:, half:], x[:, half:], beta, alpha)
        corner = _add_(average[:, half:, :half], matmul(x[:, half:], x[:, :half].mT), beta, alpha)
        average[:, :half, half:] = corner.mT
        return average
    if x.dtype == average.dtype and x.device.type != "cpu":
        return average.baddbmm_(x, x.mT, beta=beta, alpha=alpha)
    if x.dtype != average.dtype and x.device.type == "cuda":  # sums leave the tensor cores in float32
        return _add_(average, torch.bmm(x, x.mT, out_dtype=average.dtype), beta, alpha)
    return _add_(average, matmul(x, x.mT), beta, alpha)


def _add_(average: Tensor, gram: Tensor, beta: float, alpha: float) -> Tensor:
    return average.mul_(beta).add_(gram, alpha=alpha)


def _onednn(left: Tensor, right: Tensor) -> Tensor:
    # The operator of compiled linear layers: x w^T. A slice with gaps between its rows would run its reference code.
    dense = right if right.is_contiguous() or right.mT.is_contiguous() else right.contiguous()
    return torch.ops.mkldnn._linear_pointwise(left, dense.mT, None, "none", [], "")


def _onednn_is_faster(device: str) -> bool:
    return device == "cpu" and bool(torch.backends.mkldnn.enabled) and _has_onednn_with_avx512()


@lru_cache
def _has_onednn_with_avx512() -> bool:
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return wide and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
