"""A lint for any checkpoint: what encoding the gains of its norms would do to them, under every format and scale rule.

Gains that training left close together share a code within their block, and a whole block may clamp (see `clamping`).
Which ones are recommended for exemption is a rule of ours: too many elements clamp, or too many blocks whose gains
differ keep one code. State: none. Cost: some passes over a few thousand numbers per norm, format and rule.
Source of the phenomenon: arXiv 2506.20752.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from effml_shared.checks import check_range
from effml_shared.errors import ConfigError
from torch import Tensor, nn

from effml_quant.casting import fake_quantize
from effml_quant.instability.clamping import ClampCount, count_clamped, find_gains
from effml_quant.quantizer import Quantizer

__all__ = ["GainFinding", "GainLint", "lint_gains"]


@dataclass(frozen=True)
class GainFinding:
    """What one format and scale rule would do to one gain.

    Attributes:
        name, format, scale_rule: which.
        count: of its elements and blocks.
        bias: mean of q / gamma - 1 over elements that are not 0: a factor that all of them have in common.
        error: root mean square of (q - gamma) / gamma over the same.
    """

    name: str
    format: str
    scale_rule: str
    count: ClampCount
    bias: float
    error: float


@dataclass(frozen=True)
class GainLint:
    """Findings on all gains, and which to leave out of quantising."""

    findings: tuple[GainFinding, ...]
    most_clamped: float
    most_collapsed: float

    def exempt(self, format: str, scale_rule: str = "floor") -> list[str]:
        """Return the gains that should not be quantised so: too much clamps, or too many blocks keep one code."""
        return [
            f.name
            for f in self.findings
            if (f.format, f.scale_rule) == (format, scale_rule)
            and (f.count.clamp_fraction > self.most_clamped or f.count.collapsed_fraction > self.most_collapsed)
        ]

    def table(self) -> list[dict[str, Any]]:
        """Return one row per format and rule, over all gains."""
        rows = []
        for key in dict.fromkeys((f.format, f.scale_rule) for f in self.findings):
            mine = [f for f in self.findings if (f.format, f.scale_rule) == key]
            total = sum((f.count for f in mine), ClampCount())
            rows.append(
                {
                    "format": key[0],
                    "scale rule": key[1],
                    "gains": len(mine),
                    "clamped": total.clamp_fraction,
                    "last code": total.last_fraction,
                    "codes per block": total.codes_per_block,
                    "worst bias": max((f.bias for f in mine), key=abs),
                    "to exempt": len(self.exempt(*key)),
                }
            )
        return rows


@torch.no_grad()
def lint_gains(
    model: nn.Module | Mapping[str, Tensor],
    formats: Iterable[str] = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4"),
    scale_rules: Iterable[str] = ("floor", "rceil"),
    *,
    block_size: int | None = None,
    most_clamped: float = 0.01,
    most_collapsed: float = 0.5,
) -> GainLint:
    """Say what quantising its norms' gains would do to a checkpoint, under every format and scale rule.

    Args:
        model: a model or its `state_dict`.
        block_size: None: of each format.
        most_clamped: share of clamped elements from which a gain is recommended for exemption.
        most_collapsed: the same for the share of blocks whose different gains all share a code.

    Raises:
        ConfigError: a format or rule is unknown, or there are no gains.

    >>> norm = nn.LayerNorm(32)
    >>> _ = norm.weight.data.uniform_(0.9, 0.99)
    >>> lint_gains(nn.Sequential(norm)).exempt("mxfp8_e4m3")
    ['0.weight']
    >>> lint_gains(nn.Sequential(norm)).exempt("mxfp8_e4m3", "rceil")
    []
    """
    check_range("most_clamped", most_clamped, 0.0)
    check_range("most_collapsed", most_collapsed, 0.0)
    gains = find_gains(model)
    if not gains:
        raise ConfigError("model: got none with gains of norms, expected layer or RMS norms that have a weight")
    findings = []
    for fmt in formats:
        for rule in scale_rules:
            q = Quantizer(fmt, scale_rule=rule, block_size=block_size)
            for name, gain in gains.items():
                findings.append(_inspect(name, gain, q))
    return GainLint(tuple(findings), most_clamped, most_collapsed)


def _inspect(name: str, gain: Tensor, q: Quantizer) -> GainFinding:
    kept = gain != 0
    change = (fake_quantize(gain, q).double()[kept] - gain.double()[kept]) / gain.double()[kept]
    bias, error = (float(change.mean()), float(change.square().mean().sqrt())) if len(change) else (0.0, 0.0)
    return GainFinding(name, q.format.name, q.scale_rule, count_clamped(gain, q), bias, error)
