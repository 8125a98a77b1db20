"""Export: weights as packed codes and scales, whoever chose the codes.

A weight that was cast with the scale of its own largest magnitude is quantised as it stands (`effml_quant.quantize`).
GPTQ and LSQ have other scales: those of the weight before, or learned ones. `with_scales` finds the codes under scales
that are given, by the one cast there is: divided by its scale, a weight lies on the format's values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from effml_shared.errors import ConfigError
from torch import Tensor, nn

from effml_quant.blocks import Blocks
from effml_quant.packing import pack_bits
from effml_quant.qat.fixed_scale import check_fixable, unit_codes
from effml_quant.qtensor import QTensor, code_dtype, packed_bits, packing_axis, quantize
from effml_quant.quantizer import Quantizer
from effml_quant.scales import decode_factor
from effml_quant.selection import WeightFilter, select_weights

__all__ = ["to_quantized", "with_scales"]


@torch.no_grad()
def to_quantized(
    model: nn.Module,
    quantizer: str | Quantizer,
    filter: WeightFilter | None = None,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, QTensor]:
    """Return a model's weights quantised, by parameter name; `effml_quant.save_quantized` writes them.

    Args:
        weights: on the grid of the scales of the model's own weights, as `gptq` returns them; None: the model's own.
            What `Attached` deploys is exported by its `quantized()`.

    Raises:
        ConfigError: `weights` are of other names or shapes, or the format has no scale.
    """
    quantizer = Quantizer.make(quantizer)
    own = select_weights(model, filter)
    made = {name: quantize(weight, quantizer) for name, weight in own.items()}
    if weights is None:
        return made
    shapes, given = ({name: w.shape for name, w in named.items()} for named in (own, weights))
    if odd := [name for name in {**shapes, **given} if shapes.get(name) != given.get(name)]:
        raise ConfigError(f"weights: got {given.get(odd[0])} for {odd[0]}, expected {shapes.get(odd[0])}")
    return {name: with_scales(weights[name], q.scales, quantizer, q.global_scale) for name, q in made.items()}


@torch.no_grad()
def with_scales(x: Tensor, scales: Tensor, quantizer: Quantizer, global_scale: Tensor | None = None) -> QTensor:
    """Return x quantised under given scales, each value to the nearest of its grid.

    Args:
        x: any shape.
        scales, global_scale: as in `QTensor`.

    Raises:
        ConfigError: the quantiser has zero points or no scale; scales have another shape than its blocks.
    """
    check_fixable(quantizer)
    blocks = Blocks.cut(tuple(x.shape), quantizer.axis, quantizer.block)
    if tuple(scales.shape) != blocks.scales:
        raise ConfigError(f"scales: got shape {tuple(scales.shape)}, expected {blocks.scales}")
    factor = decode_factor(scales, quantizer, global_scale)
    factor = blocks.join(factor.reshape(blocks.broadcast).expand(blocks.view))
    codes = unit_codes((x / factor).nan_to_num(0.0), quantizer)
    bits = packed_bits(quantizer) if x.ndim else 8
    if bits < 8:
        codes = pack_bits(codes.view(torch.uint8) & ((1 << bits) - 1), bits, packing_axis(quantizer))
    else:
        codes = codes.view(code_dtype(quantizer))
    return QTensor(codes, scales, quantizer, x.shape, x.dtype, global_scale)
