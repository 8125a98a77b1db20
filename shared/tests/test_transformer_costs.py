from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from effml_shared.transformer import Transformer, TransformerConfig
from effml_shared.transformer_costs import count_params, forward_flops, kv_bytes, training_flops_per_token
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

OLMO = TransformerConfig(vocab_size=32100, norm="layer", norm_eps=1e-5, qk_norm="full", mlp="gelu", position="alibi")
SMALL = TransformerConfig(vocab_size=32100, mlp="gelu")
PRESETS = {  # config, parameters of the body, all parameters, cache bytes per token in bfloat16
    "olmo-150m": (replace(OLMO, n_layers=12, d_model=1024, n_heads=16), 151_045_120, 216_843_264, 49_152),
    "olmo-150m-6l": (replace(OLMO, n_layers=6, d_model=1408, n_heads=22), 142_772_608, 233_245_056, 33_792),
    "olmo-300m": (replace(OLMO, n_layers=24, d_model=1024, n_heads=16), 302_089_216, 367_887_360, 98_304),
    "olmo-300m-12l": (replace(OLMO, n_layers=12, d_model=1408, n_heads=22), 285_543_808, 376_016_256, 67_584),
    "olmo-300m-6l": (replace(OLMO, n_layers=6, d_model=2048, n_heads=32), 302_041_088, 433_637_376, 49_152),
    "olmo-600m": (replace(OLMO, n_layers=24, d_model=1408, n_heads=22), 571_086_208, 661_558_656, 135_168),
    "olmo-1.2b": (replace(OLMO, n_layers=24, d_model=2048, n_heads=32), 1_208_158_208, 1_339_754_496, 196_608),
    "mx-n6": (replace(OLMO, n_layers=6, d_model=384, n_heads=6, vocab_size=32000), 10_626_432, 35_202_432, 9_216),
    "gn-45m": (replace(SMALL, n_layers=4, d_model=512, n_heads=8), 12_587_520, 45_486_592, 8_192),
    "gn-45m-swiglu": (
        replace(SMALL, n_layers=4, d_model=512, n_heads=8, mlp="swiglu", d_ff=2048),
        16_781_824,
        49_680_896,
        8_192,
    ),
    "gn-150m": (replace(SMALL, n_layers=12, d_model=768, n_heads=16), 84_953_856, 134_302_464, 36_864),
    "gn-150m-swiglu": (
        replace(SMALL, n_layers=12, d_model=768, n_heads=16, mlp="swiglu", d_ff=3072),
        113_265_408,
        162_614_016,
        36_864,
    ),
    "test-tiny": (
        TransformerConfig(n_layers=2, d_model=64, n_kv_heads=2, vocab_size=128, qk_norm="head", tied=True),
        123_264,
        131_456,
        256,
    ),
}


@pytest.mark.parametrize("name", PRESETS)
def test_counts_of_known_models(name: str) -> None:
    config, body, total, cache = PRESETS[name]
    assert count_params(config, embeddings=False) == body
    assert count_params(config) == total
    assert kv_bytes(config) == cache
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Transformer(config).parameters()) == total


def test_counts_of_biases() -> None:
    for mlp in ("swiglu", "relu"):
        config = replace(PRESETS["test-tiny"][0], mlp=mlp, mlp_bias=True, tied=False, qk_norm="full")
        assert sum(parameter.numel() for parameter in Transformer(config).parameters()) == count_params(config)


def test_default_width_of_swiglu() -> None:
    assert [TransformerConfig(d_model=d, n_heads=1).ff_dim for d in (64, 1024, 1408, 2048)] == [256, 2816, 3840, 5376]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_flops_equal_what_pytorch_counts(causal: bool, mlp: str) -> None:
    config = replace(PRESETS["test-tiny"][0], causal=causal, mlp=mlp)
    model, n = Transformer(config), 24
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros(1, n, dtype=torch.int64)).logits
        forward = counter.get_total_flops()
        logits[..., :1].sum().backward()
    unseen = n * (n - 1) // 2 if causal else 0  # the pairs above the diagonal, which plain attention multiplies too
    assert forward == forward_flops(config, n) + 2 * config.n_layers * 2 * config.d_model * unseen
    assert counter.get_total_flops() == 3 * forward


def test_training_flops_of_a_known_model() -> None:
    assert training_flops_per_token(PRESETS["olmo-150m"][0], 1024) == 1_178_935_296
    assert training_flops_per_token(PRESETS["olmo-150m"][0], 1024, recompute=True) == 1_178_935_296 * 4 / 3


def test_cache_bytes_equal_the_cache() -> None:
    config = PRESETS["test-tiny"][0]
    model = Transformer(config)
    cache = model.new_cache(max_len=10)
    with torch.no_grad():
        model(torch.zeros(3, 10, dtype=torch.int64), cache=cache)
    assert cache.nbytes == 3 * 10 * kv_bytes(config, torch.float32)
