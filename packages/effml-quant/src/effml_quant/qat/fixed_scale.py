"""Cast with a scale that is known beforehand, by the one cast there is.

A block's scale follows from its largest magnitude alone. So a block that gets that magnitude as one more element, and
is clamped to it, is cast under exactly the scale wanted. Cost: one element more per block, and one copy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_quant.blocks import Blocks
from effml_quant.casting import fake_quantize, quantize_blocks
from effml_quant.quantizer import Quantizer

__all__ = ["block_maxima", "cast_rows", "check_fixable", "unit_codes", "unit_maximum"]


def check_fixable(quantizer: Quantizer) -> None:
    """Raise a `ConfigError` unless the scale of a block depends on its largest magnitude alone."""
    if quantizer.recipe == "asymmetric" or quantizer.scale_kind == "none":
        got = quantizer.recipe or quantizer.format.name
        raise ConfigError(f"quantizer: got {got!r}, expected one whose scale is set by a block's largest magnitude")


def cast_rows(x: Tensor, amax: Tensor, quantizer: Quantizer, global_scale: Tensor | None = None) -> Tensor:
    """Cast every row as a block whose largest magnitude is given; what lies beyond it is cast as if at it.

    Args:
        x: (rows, n), float32 or float64; n = 1 for NVFP4.
        amax: (rows, 1), at least 0.
        quantizer: its blocks are not used.
        global_scale: of NVFP4.

    >>> cast_rows(torch.tensor([[0.26, 2.0]]), torch.tensor([[0.7]]), Quantizer("int4"))
    tensor([[0.3000, 0.7000]])
    """
    rows = torch.cat([torch.minimum(torch.maximum(x, -amax), amax), amax], dim=1)
    if quantizer.scale_kind == "e4m3":
        rows, quantizer = F.pad(rows, (0, 16 - rows.shape[1])), quantizer.replace(axis=-1, block_size=16)
    else:
        quantizer = quantizer.replace(block_size=None, granularity="channel")
    return fake_quantize(rows, quantizer, global_scale=global_scale)[:, : x.shape[1]]


def unit_maximum(quantizer: Quantizer) -> float:
    """Return the largest magnitude of a block whose real-valued scale is exactly 1."""
    largest = quantizer.format.max
    return largest + quantizer.format.spacing / 2 if quantizer.recipe == "torchao" else largest


def unit_codes(z: Tensor, quantizer: Quantizer) -> Tensor:
    """Return the codes of values given in units of their scale, unpacked, shaped like z."""
    top = unit_maximum(quantizer)
    whole = quantizer.replace(scale="continuous", block_size=None, granularity="tensor", rounding="rne")
    flat = torch.cat([z.flatten().clamp(-top, top), z.new_full((1,), top)])
    return quantize_blocks(flat, whole).codes[:-1].reshape(z.shape)


def block_maxima(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Return for each element the largest magnitude of its block, shaped like x."""
    blocks = Blocks.cut(tuple(x.shape), quantizer.axis, quantizer.block)
    view = blocks.split(x).abs()
    return blocks.join(view.amax(blocks.dims, keepdim=True).expand_as(view))
