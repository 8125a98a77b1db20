from __future__ import annotations

import dataclasses

import pytest
from effml_quant import Format, Quantizer, formats
from effml_shared.errors import ConfigError


def test_defaults_are_the_standards():
    q = Quantizer("mxfp4")
    assert (q.axis, q.block, q.scale_rule, q.rounding, q.scale_kind) == (-1, 32, "floor", "rne", "e8m0")
    assert (Quantizer("nvfp4").block, Quantizer("nvfp4").scale_kind) == (16, "e4m3")
    assert (Quantizer("int8").block, Quantizer("int8").scale_kind) == ("tensor", "float32")
    assert Quantizer("bf16").scale_kind == "none"


def test_a_quantizer_is_a_value():
    q = Quantizer("mxfp4", axis=0, block_size=[16, 16])
    assert q == Quantizer(formats["mxfp4"], 0, (16, 16))
    assert hash(q) == hash(Quantizer("mxfp4_e2m1", axis=0, block_size=(16, 16)))
    assert q.replace(axis=1) == dataclasses.replace(q, axis=1) != q
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.axis = 1


def test_make():
    q = Quantizer("int4")
    assert Quantizer.make(q) is q
    assert Quantizer.make(q, rounding="away").rounding == "away"
    assert Quantizer.make("int4") == q
    assert Quantizer.make(Format.floating("mine", 3, 4), axis=0).format.name == "mine"


def test_blocks():
    assert Quantizer("int4", granularity="channel").block == "channel"
    assert Quantizer("mxfp4", granularity="tensor").block == "tensor"
    assert Quantizer("int4", granularity=("group", 64)).block == Quantizer("int4", block_size=64).block == 64
    assert Quantizer("mxfp4", granularity=["group", 8]).block == 8
    assert Quantizer("nvfp4", block_size=(16, 16)).block == (16, 16)


def test_a_continuous_scale():
    q = Quantizer("mxfp4", scale="continuous")
    assert (q.scale_kind, q.block) == ("float32", 32)
    assert Quantizer("nvfp4", scale="continuous", block_size=8).block == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "mxfp5"}, r"format: got 'mxfp5', did you mean '\w+'\?"),
        ({"scale_rule": "round"}, r"scale_rule: got 'round', expected 'floor', 'rceil', 'ceil', 'even', 'bump'"),
        ({"scale": "real"}, r"scale: got 'real', expected 'format', 'continuous'"),
        ({"rounding": "nearest"}, r"rounding: got 'nearest', expected 'rne', 'away', 'toward_zero', 'stochastic'"),
        ({"nonfinite": "ignore"}, r"nonfinite: got 'ignore', expected 'nan_block', 'raise'"),
        ({"recipe": "te"}, r"recipe: got 'te', expected None for mxfp4"),
        ({"format": "nvfp4", "recipe": "symmetric"}, r"recipe: got 'symmetric', expected 'te', 'torchao'"),
        ({"format": "fp4", "recipe": "asymmetric"}, r"recipe: got 'asymmetric', expected 'symmetric'"),
        ({"axis": 1.0}, r"axis: got 1.0, expected an integer"),
        ({"axis": True}, r"axis: got True, expected an integer"),
        ({"block_size": 0}, r"block_size: got 0, expected an integer >= 1 or a tile of two"),
        ({"block_size": -32}, r"block_size: got -32, expected"),
        ({"block_size": 32.0}, r"block_size: got 32.0, expected"),
        ({"block_size": (4,)}, r"block_size: got \(4,\), expected"),
        ({"block_size": (4, 0)}, r"block_size: got \(4, 0\), expected"),
        ({"block_size": (4, 4, 4)}, r"block_size: got \(4, 4, 4\), expected"),
        ({"block_size": "tensor"}, r"block_size: got 'tensor', expected"),
        ({"granularity": "row"}, r"granularity: got 'row', expected 'tensor', 'channel' or \('group', size\)"),
        ({"granularity": 32}, r"granularity: got 32, expected"),
        ({"granularity": ("block", 32)}, r"granularity: got \('block', 32\), expected"),
        ({"granularity": ("group",)}, r"granularity: got \('group',\), expected"),
        ({"granularity": ("group", 0)}, r"block_size: got 0, expected"),
        ({"granularity": "tensor", "block_size": 4}, r"block_size, granularity: got 4, tensor, expected one"),
        ({"format": "nvfp4", "block_size": 32}, r"block_size: got 32, expected 16 or \(16, 16\) for nvfp4"),
        ({"format": "nvfp4", "granularity": "tensor"}, r"block_size: got 'tensor', expected 16 or"),
        ({"block": 32}, r"quantizer: got an unknown field 'block', expected axis, block_size"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        Quantizer(**({"format": "mxfp4"} | fields))


def test_too_many_values():
    with pytest.raises(ConfigError, match=r"quantizer: got 10 values, expected at most 9"):
        Quantizer("mxfp4", *range(9))
