"""Weights of a model on a format's grid, and what that costs: error, saturation, underflow and bytes per layer.

    relative error   |q(w) - w| / |w|                SQNR   -20 log10 of it, in decibels
    clamped          share of |w| above the block's largest value      last code   share on that value
    underflow        share of w that is not zero and becomes it

`quantize_weights_` changes a model in place; `what_if` changes nothing and compares formats and scale rules. Sums are
in float64. Cost: one cast per weight and format, and its magnitudes in float32 meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from effml_shared.errors import ConfigError, NonFiniteError
from torch import Tensor, nn

from effml_quant.casting import check_input, fake_quantize, to_grid
from effml_quant.formats import Format
from effml_quant.qtensor import stored_bytes
from effml_quant.quantizer import Quantizer
from effml_quant.selection import WeightFilter, select_weights

__all__ = ["CastReport", "measure", "quantize_weights_", "what_if"]

_COMPARED = ("mxfp8_e4m3", "mxfp8_e5m2", "mxint8", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "nvfp4", "int8", "int4")


class CastReport(NamedTuple):
    """What quantising one tensor, or all of a model, did. Shares are of all elements.

    Attributes:
        name: of the tensor.
        format, scale_rule: of the quantiser; the rule is None where the scale is no power of two.
        relative_error: norm of the change over norm of the tensor; NaN where a block is.
        sqnr_db: signal to quantisation noise; infinite where nothing changed.
        clamped, last_code, underflow: see the module.
        nbytes, bits_per_element: of codes and scales.
    """

    name: str
    format: str
    scale_rule: str | None
    relative_error: float
    sqnr_db: float
    clamped: float
    last_code: float
    underflow: float
    nbytes: int
    bits_per_element: float


class _Sums(NamedTuple):
    """What adds up over tensors."""

    elements: int
    signal: float
    noise: float
    clamped: int
    last_code: int
    underflow: int
    nbytes: int

    def report(self, name: str, q: Quantizer) -> CastReport:
        count = max(self.elements, 1)
        error = math.sqrt(self.noise / self.signal) if self.signal else math.sqrt(self.noise)
        return CastReport(
            name=name,
            format=q.format.name,
            scale_rule=q.scale_rule if q.scale_kind == "e8m0" else None,
            relative_error=error,
            sqnr_db=math.inf if error == 0 else -20 * math.log10(error),
            clamped=self.clamped / count,
            last_code=self.last_code / count,
            underflow=self.underflow / count,
            nbytes=self.nbytes,
            bits_per_element=8 * self.nbytes / count,
        )


def _sums(x: Tensor, quantized: Tensor, q: Quantizer) -> _Sums:
    """Compare a tensor with its quantised twin. Which elements saturate does not depend on how they are rounded."""
    nearest = q.replace(rounding="rne") if q.rounding == "stochastic" else q
    nbytes = stored_bytes(tuple(x.shape), q, x.dtype)
    if not x.numel():
        return _Sums(0, 0.0, 0.0, 0, 0, 0, nbytes)
    grid = to_grid(x, nearest)
    high = torch.where(grid.negative, grid.scale.low, grid.scale.high)
    clamped, last = grid.blocks.join(grid.z > high), grid.blocks.join(grid.p == high)
    return _Sums(
        elements=x.numel(),
        signal=float(x.double().square().sum()),
        noise=float((quantized.double() - x.double()).square().sum()),
        clamped=int(clamped.sum()),
        last_code=int(last.sum()),
        underflow=int(((quantized == 0) & (x != 0)).sum()),
        nbytes=nbytes,
    )


@torch.no_grad()
def measure(x: Tensor, fmt: str | Format | Quantizer, *, name: str = "", **fields: Any) -> CastReport:
    """Return what quantising a tensor does to it; arguments are those of `fake_quantize`.

    >>> report = measure(torch.tensor([7.9, 1.0, 0.01, 0.0]), "mxfp4")
    >>> report.clamped, report.last_code, report.underflow, report.nbytes
    (0.25, 0.25, 0.25, 3)
    """
    generator, q = fields.pop("generator", None), Quantizer.make(fmt, **fields)
    return _sums(x, fake_quantize(x, q, generator=generator), q).report(name, q)


@torch.no_grad()
def quantize_weights_(
    model: nn.Module,
    fmt: str | Format | Quantizer,
    filter: WeightFilter | None = None,
    *,
    generator: torch.Generator | None = None,
    **fields: Any,
) -> list[CastReport]:
    """Round a model's weights to a format in place, in their own dtype, and return one report per weight.

    Args:
        filter: `filter(module_name, module)` chooses; None: linear and convolution layers without output heads.
        generator: of stochastic rounding.
        **fields: of `Quantizer`.

    Raises:
        ConfigError: there is nothing to quantise, or a weight cannot be cut so; no weight has changed then.
        NonFiniteError: a weight is not finite and `nonfinite="raise"`; no weight has changed then.
    """
    q = Quantizer.make(fmt, **fields)
    weights = select_weights(model, filter)
    for name, weight in weights.items():
        try:
            check_input(weight, q)
        except (ConfigError, NonFiniteError) as error:
            raise type(error)(f"{name}: {error}") from None
    reports = []
    for name, weight in weights.items():
        quantized = fake_quantize(weight, q, generator=generator)
        reports.append(_sums(weight, quantized, q).report(name, q))
        weight.copy_(quantized)
    return reports


@torch.no_grad()
def what_if(
    source: nn.Module | Tensor,
    candidates: Iterable[str | Format | Quantizer] = _COMPARED,
    scale_rules: Iterable[str] = ("floor", "rceil", "even"),
    filter: WeightFilter | None = None,
    **fields: Any,
) -> list[CastReport]:
    """Return one report for each format, under each rule where its scale is a power of two, and change nothing.

    A model's weights, chosen as by `quantize_weights_`, count as one tensor, each with its own scales.

    Raises:
        ConfigError: a format or rule is unknown, there is nothing to quantise, or a weight cannot be cut so.
    """
    tensors = {"": source} if isinstance(source, Tensor) else select_weights(source, filter)
    rules, reports = tuple(scale_rules), []
    for candidate in candidates:
        first = Quantizer.make(candidate, **fields)
        variants = [first.replace(scale_rule=rule) for rule in rules] if first.scale_kind == "e8m0" else [first]
        for q in variants:
            sums = [_sums(x, fake_quantize(x, q), q) for x in tensors.values()]
            total = _Sums(*(sum(parts) for parts in zip(*sums, strict=True)))
            reports.append(total.report("" if isinstance(source, Tensor) else "model", q))
    return reports
