"""Predicted costs of casting against the loss that is measured."""

from __future__ import annotations

import math

import pytest
import torch
from effml_quant import Quantizer
from effml_quant.lotion import Lotion, LotionConfig
from effml_quant.lotion.report import layer_report
from effml_quant.lotion.variance import cast, randomized_round
from torch import nn

ROWS = Quantizer("int4", granularity="channel")


def test_gap_is_the_rise_of_a_quadratic_by_randomised_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, 300, generator=generator, dtype=torch.float64)
    h = torch.rand(1, 300, generator=generator, dtype=torch.float64)
    row = layer_report("w", w, (h, 0.5), ROWS, {"int3": Quantizer("int3", granularity="channel")})
    assert (row.name, row.numel) == ("w", 300)
    for q, gap in ((ROWS, row.gap), (Quantizer("int3", granularity="channel"), row.gaps["int3"])):
        errors = randomized_round(w.repeat(500, 1), q, generator) - w
        rises = 0.25 * (h * errors.square()).sum(1)
        assert gap == pytest.approx(float(rises.mean()), rel=0.02)
        nearest = float(0.25 * (h * (cast(w, q) - w).square()).sum())
        assert nearest == pytest.approx(gap / 2, rel=0.2)


def test_fraction_on_the_grid() -> None:
    w = torch.tensor([[7.0, 3.04, -2.96, 1.5, 0.2, 5.0, -4.06, 0.0]])
    assert layer_report("w", w, None, ROWS, {}).on_grid == 5 / 8
    assert layer_report("w", cast(torch.randn(4, 9), ROWS), None, ROWS, {}).on_grid == 1


def test_of_a_model() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    lotion = Lotion(net, LotionConfig("int4", "channel"))
    assert all(math.isnan(row.gap) for row in lotion.report())
    net(torch.randn(16, 8)).square().mean().backward()
    lotion.accumulate(16)
    rows = lotion.report(["int8", "int2", Quantizer("mxfp4", scale_rule="rceil")])
    assert [row.name for row in rows] == ["0.weight", "1.weight"]
    for row in rows:
        assert 0 < row.gaps["int8"] < row.gap < row.gaps["int2"]
        assert set(row.gaps) == {"int8", "int2", "mxfp4"}
    assert sum(row.gap for row in rows) == pytest.approx(lotion.penalty().item(), rel=1e-5)
