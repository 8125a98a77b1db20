from __future__ import annotations

import pytest
import torch
from effml_arch.presets import PRESETS, gn, mx, olmo, preset, tiny
from effml_shared.errors import ConfigError
from effml_shared.transformer import Transformer
from effml_shared.transformer_costs import count_params, kv_bytes, training_flops_per_token

KNOWN = {  # parameters outside embedding and head, all parameters, cache bytes per token in bfloat16
    "olmo-150m": (151_045_120, 216_843_264, 49_152),
    "olmo-150m-6l": (142_772_608, 233_245_056, 33_792),
    "olmo-300m": (302_089_216, 367_887_360, 98_304),
    "olmo-300m-12l": (285_543_808, 376_016_256, 67_584),
    "olmo-300m-6l": (302_041_088, 433_637_376, 49_152),
    "olmo-600m": (571_086_208, 661_558_656, 135_168),
    "olmo-1.2b": (1_208_158_208, 1_339_754_496, 196_608),
    "mx-n6": (10_626_432, 35_202_432, 9_216),
    "gn-45m": (12_587_520, 45_486_592, 8_192),
    "gn-45m-swiglu": (16_781_824, 49_680_896, 8_192),
    "gn-150m": (84_953_856, 134_302_464, 36_864),
    "gn-150m-swiglu": (113_265_408, 162_614_016, 36_864),
    "test-tiny": (123_264, 131_456, 256),
}


def test_every_preset_is_known() -> None:
    assert set(PRESETS) | {"mx-n6"} == set(KNOWN)


@pytest.mark.parametrize("name", KNOWN)
def test_counts_to_the_unit(name: str) -> None:
    config = preset(name)
    assert (count_params(config, embeddings=False), count_params(config), kv_bytes(config)) == KNOWN[name]
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Transformer(config).parameters()) == KNOWN[name][1]


def test_the_layer_of_the_released_training_file_counts_as_reported() -> None:
    assert count_params(preset("olmo-300m-12l", d_model=1440, n_heads=16, d_ff=5760)) == 391_197_600


def test_shapes() -> None:
    config = preset("olmo-300m-6l")
    assert (config.head_dim, config.kv_heads, config.ff_dim, config.rows) == (64, 32, 8192, 32_128)
    assert config == olmo(6, 2048)
    assert mx(6) == preset("mx-n6")
    assert mx(6).d_model == 64 * 6
    assert gn(4, 512, 8, mlp="swiglu").ff_dim == 2048
    assert training_flops_per_token(preset("olmo-150m"), 1024) == 1_178_935_296


def test_the_smallest_preset_runs() -> None:
    assert Transformer(tiny())(torch.zeros(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 128)


def test_fields_can_be_changed() -> None:
    assert preset("gn-45m", tied=True).tied
    assert not preset("gn-45m").tied


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("olmo-150", {}, r"preset: got 'olmo-150', expected 'olmo-150m' perhaps"),
        ("zzz", {}, r"preset: got 'zzz', expected one of olmo-150m, "),
        ("mx-n0", {}, r"preset: got 'mx-n0'"),
        ("test-tiny", {"n_layer": 3}, r"got a field 'n_layer', expected 'n_layers' perhaps"),
        ("test-tiny", {"n_heads": 3}, r"n_heads: got 3"),
    ],
)
def test_wrong_names_are_answered_with_the_nearest(name: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preset(name, **changes)


@pytest.mark.parametrize("width", [0, 32, -64, 1.5, None])
def test_wrong_widths(width: int) -> None:
    with pytest.raises(ConfigError, match=r"d_model|n_heads"):
        olmo(2, width)
