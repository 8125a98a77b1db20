"""What LOTION can be told, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_quant import formats
from effml_quant.lotion import LotionConfig
from effml_quant.lotion.configuration import choose_weights
from effml_shared.errors import ConfigError
from torch import nn


@pytest.mark.parametrize("name", [name for name in formats if name != "bfloat16"])
def test_every_format_has_a_continuous_scale(name: str) -> None:
    q = LotionConfig(name).quantizer
    assert q.scale_kind == "float32"
    assert LotionConfig(name, scale="format").quantizer.scale_kind == formats[name].scale


def test_granularity() -> None:
    assert LotionConfig("int4").quantizer.block == "tensor"
    assert LotionConfig("mxfp4").quantizer.block == 32
    assert LotionConfig("int4", ("group", 8)).quantizer.block == 8
    assert LotionConfig("int4", ["group", 8]).quantizer.block == 8  # type: ignore[arg-type]  as from a file


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "int44"}, r"format: got 'int44', did you mean"),
        ({"format": "bfloat16"}, r"format: got bfloat16, expected one with a scale"),
        ({"granularity": ("group", 0)}, r"granularity|block_size"),
        ({"granularity": "row"}, r"granularity: got 'row'"),
        ({"scale": "real"}, r"scale: got 'real'"),
        ({"strength": -1.0}, r"strength: got -1\.0"),
        ({"strength": float("nan")}, r"strength: got nan"),
        ({"curvature": "fisher"}, r"curvature: got 'fisher', expected one of 'empirical_fisher'"),
        ({"beta": 1.0}, r"beta: got 1\.0"),
        ({"batch_correction": 0}, r"batch_correction: got 0"),
        ({"batch_correction": "samples"}, r"batch_correction: got 'samples'"),
        ({"every": 0}, r"every: got 0"),
        ({"warmup": -1}, r"warmup: got -1"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LotionConfig(**fields)


def test_chosen_weights() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].weight.requires_grad_(False)
    assert list(choose_weights(net, None)) == ["1.weight"]
    net[1].weight.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"model: got no weight that requires a gradient"):
        choose_weights(net, None)
    with pytest.raises(ConfigError, match=r"filter: got one for bare parameters"):
        choose_weights(net.parameters(), lambda name, module: True)
    for bad in (torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.complex64)):
        with pytest.raises(ConfigError, match=r"0: got torch\.(int32|complex64), expected a floating parameter"):
            choose_weights([bad], None)
    with pytest.raises(ConfigError, match=r"0: got str"):
        choose_weights(["weight"], None)
