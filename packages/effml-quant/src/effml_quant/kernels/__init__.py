"""Fast versions of the casts, each equal bit by bit to the plain one: C on the CPU, Triton on a GPU.

Each function returns None where the plain version must serve: other dtypes, tiles, asymmetric integers, tensors of
functorch or of a tracer, no compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effml_quant.kernels import native
from effml_quant.quantizer import Quantizer

__all__ = ["cast", "cast_both", "codes_of", "values_of"]

values_of = native.values_of


def cast(
    x: Tensor,
    q: Quantizer,
    seed: Tensor | None = None,
    global_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | None:
    """Return x on its grid, in its dtype: in `out`, contiguous and like x, or in fresh memory."""
    if torch.compiler.is_compiling():
        return None
    if x.is_cuda:
        from effml_quant.kernels import gpu

        return gpu.cast(x, q, seed, global_scale, out)
    return native.cast(x, q, seed, global_scale, out)


def cast_both(x: Tensor, rows: Quantizer, columns: Quantizer) -> tuple[Tensor, Tensor] | None:
    """Return a matrix cast along its last and along its first axis, read once."""
    if torch.compiler.is_compiling():
        return None
    if x.is_cuda:
        from effml_quant.kernels import gpu

        return gpu.cast_both(x, rows, columns)
    return native.cast_both(x, rows, columns)


def codes_of(
    x: Tensor, q: Quantizer, seed: Tensor | None = None, global_scale: Tensor | None = None, *, packed: bool = False
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Return codes (uint8 or int8; if `packed`, flat bytes), scales and the tensor's scale."""
    if torch.compiler.is_compiling():
        return None
    if x.is_cuda:
        from effml_quant.kernels import gpu

        return gpu.codes_of(x, q, seed, global_scale, packed=packed)
    return native.codes_of(x, q, seed, global_scale, packed=packed)
