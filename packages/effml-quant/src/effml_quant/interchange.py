"""MXFP4 weights in the layouts of public checkpoints, both ways, without rounding anything again.

    GPT-OSS       <name>_blocks uint8 (..., groups, 16), <name>_scales uint8 (..., groups); also <name>.blocks, .scales
    DeepSeek-V4   codes int8 (..., K / 2) and scales float8_e8m0fnu (..., K / 32)

Both hold, along the last axis, 32 codes of E2M1 per group, two in a byte with the even index in the low nibble, and a
byte e that means 2^(e - 127) times the element's own value. The element's largest exponent is not in the byte a second
time: whoever takes it off once more reads weights four times too small. The second layout is as publicly described; no
primary text was at hand to confirm it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_quant.qtensor import QTensor
from effml_quant.quantizer import Quantizer

__all__ = ["from_deepseek", "from_gpt_oss", "read_gpt_oss", "to_deepseek", "to_gpt_oss", "write_gpt_oss"]

_GROUP, _BYTES = 32, 16
_SUFFIXES = (("_blocks", "_scales"), (".blocks", ".scales"))


def from_gpt_oss(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> QTensor:
    """Return the weight (..., 32 groups) of one pair of tensors.

    Args:
        blocks: uint8 (..., groups, 16).
        scales: uint8 (..., groups).
        dtype: of the weight where it is dequantised.

    Raises:
        ConfigError: dtypes or shapes are not these.
    """
    _check("blocks", blocks, torch.uint8, (*scales.shape, _BYTES))
    _check("scales", scales, torch.uint8, tuple(scales.shape))
    return _weight(blocks.flatten(-2), scales.view(torch.float8_e8m0fnu), dtype)


def to_gpt_oss(weight: QTensor) -> tuple[Tensor, Tensor]:
    """Return blocks, uint8 (..., groups, 16), and scales, uint8 (..., groups).

    Raises:
        ConfigError: the weight is not MXFP4 in whole blocks of 32 along its last axis.
    """
    _check_exportable(weight)
    groups = weight.scales.shape[-1]
    return weight.codes.unflatten(-1, (groups, _BYTES)), weight.scales.view(torch.uint8)


def from_deepseek(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> QTensor:
    """Return the weight (..., K) of int8 codes (..., K / 2) and float8_e8m0fnu scales (..., K / 32).

    Raises:
        ConfigError: dtypes or shapes are not these.
    """
    _check("scales", scales, torch.float8_e8m0fnu, tuple(scales.shape))
    _check("codes", codes, torch.int8, (*scales.shape[:-1], scales.shape[-1] * _BYTES) if scales.ndim else (_BYTES,))
    return _weight(codes.view(torch.uint8), scales, dtype)


def to_deepseek(weight: QTensor) -> tuple[Tensor, Tensor]:
    """Return codes, int8 (..., K / 2), and scales, float8_e8m0fnu (..., K / 32).

    Raises:
        ConfigError: the weight is not MXFP4 in whole blocks of 32 along its last axis.
    """
    _check_exportable(weight)
    return weight.codes.view(torch.int8), weight.scales


def read_gpt_oss(tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> dict[str, QTensor | Tensor]:
    """Return a checkpoint's tensors with each pair of blocks and scales made one weight.

    Raises:
        ConfigError: blocks or scales have no partner, or a pair does not fit.
    """
    out: dict[str, QTensor | Tensor] = {}
    for name, tensor in tensors.items():
        ending = next((pair for pair in _SUFFIXES if name.endswith(pair)), None)
        if ending is None:
            out[name] = tensor
            continue
        stem = name.removesuffix(ending[0]).removesuffix(ending[1])
        if missing := {stem + ending[0], stem + ending[1]} - set(tensors):
            raise ConfigError(f"{name}: got it alone, expected {min(missing)} beside it")
        if name.endswith(ending[0]):
            try:
                out[stem] = from_gpt_oss(tensor, tensors[stem + ending[1]], dtype)
            except ConfigError as error:
                raise ConfigError(f"{stem}: {error}") from None
    return out


def write_gpt_oss(tensors: Mapping[str, QTensor | Tensor]) -> dict[str, Tensor]:
    """Undo `read_gpt_oss`, with names `<name>_blocks` and `<name>_scales`.

    Raises:
        ConfigError: a quantised weight is not MXFP4 in whole blocks of 32 along its last axis.
    """
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, QTensor):
            out[f"{name}_blocks"], out[f"{name}_scales"] = to_gpt_oss(tensor)
        else:
            out[name] = tensor
    return out


def _weight(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> QTensor:
    shape = torch.Size((*codes.shape[:-1], 2 * codes.shape[-1]))
    return QTensor(codes.contiguous(), scales.contiguous(), Quantizer("mxfp4"), shape, dtype)


def _check(name: str, x: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x.dtype != dtype or tuple(x.shape) != shape or not x.ndim:
        raise ConfigError(f"{name}: got {x.dtype} {tuple(x.shape)}, expected {dtype} {shape or '(..., groups)'}")


def _check_exportable(weight: QTensor) -> None:
    q, fmt = weight.quantizer, weight.fmt
    elements = (fmt.exp_bits, fmt.man_bits, fmt.bias, fmt.max) == (2, 1, 1, 6.0) and q.scale_kind == "e8m0"
    along = q.block == _GROUP and weight.ndim > 0 and q.axis in (-1, weight.ndim - 1)
    if not elements or not along or weight.shape[-1] % _GROUP:
        raise ConfigError(
            f"weight: got {fmt.name} {tuple(weight.shape)} in blocks of {q.block} along axis {q.axis}, "
            f"expected mxfp4 in whole blocks of {_GROUP} along the last axis"
        )
