from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from effml_arch.cost_ledger import decode_bytes, rt_cost, tile_rows, transformer_cost
from effml_arch.presets import preset
from effml_arch.recurrent import RecurrentTransformer, RecurrentTransformerConfig
from effml_shared.errors import ConfigError
from effml_shared.layers import TransformerConfig
from effml_shared.transformer import Transformer
from effml_shared.transformer_costs import forward_flops, training_flops_per_token
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

SMALL = TransformerConfig(n_layers=3, d_model=64, n_heads=4, n_kv_heads=2, vocab_size=100)


def schedule(n: int, base: int) -> list[tuple[range, range]]:
    """Return (queries, keys) of everything that reads keys, from the definition."""
    reads = [(range(t, t + 1), range(t - t % base, t)) for t in range(n)]
    for c in range(base, n, base):
        size = base
        while c % (2 * size) == 0:
            size *= 2
        reads.append((range(c, min(c + size, n)), range(c - size, c)))
    return reads


@settings(deadline=None)
@given(n=st.integers(1, 150), base=st.integers(1, 20))
def test_rows_are_those_of_a_schedule_that_covers_every_pair_once(n: int, base: int) -> None:
    reads = schedule(n, base)
    pairs = sorted((q, k) for queries, keys in reads for q in queries for k in keys)
    assert pairs == [(q, k) for q in range(n) for k in range(q)]
    tiles = reads[n:]
    assert tile_rows(n, base) == (sum(len(keys) for _, keys in reads), sum(len(queries) for queries, _ in tiles))


@pytest.mark.parametrize(("n", "keys"), [(512, 2304), (1000, 5052), (1024, 5120), (2048, 11264), (4096, 24576)])
def test_rows_of_known_lengths(n: int, keys: int) -> None:
    assert tile_rows(n)[0] == keys
    if n & (n - 1) == 0:
        assert tile_rows(n) == (n // 2 * int(math.log2(n)),) * 2


@pytest.mark.parametrize(
    ("name", "percent"),
    [("olmo-150m", 13.2), ("olmo-150m-6l", 12.4), ("olmo-300m", 14.5), ("olmo-300m-12l", 14.0), ("olmo-300m-6l", 13.5)],
)
def test_equal_parameters_are_not_equal_flops(name: str, percent: float) -> None:
    recurrent, plain = rt_cost(preset(name), 512), transformer_cost(preset(name), 512)
    assert recurrent.params == plain.params
    assert recurrent.kv_bytes_per_token == plain.kv_bytes_per_token
    assert 100 * (recurrent.forward_flops / plain.forward_flops - 1) == pytest.approx(percent, abs=0.051)


@settings(deadline=None)
@given(n=st.integers(1, 300), batch=st.integers(1, 5), layers=st.sets(st.integers(0, 2)))
def test_flops_differ_by_the_second_projection_of_the_recurrent_layers(n: int, batch: int, layers: set[int]) -> None:
    hybrid = rt_cost(SMALL, n, batch, recurrent_layers=sorted(layers))
    assert hybrid.forward_flops - batch * forward_flops(SMALL, n) == 2 * 2 * len(layers) * 64 * 32 * n * batch
    assert hybrid.backward_flops == 2 * hybrid.forward_flops
    assert hybrid.sequential_steps == 3 - len(layers) + len(layers) * n
    assert hybrid.tokens == n * batch


@pytest.mark.parametrize("layers", ["all", (1,)])
def test_flops_equal_what_pytorch_counts_position_by_position(layers: str | tuple[int, ...]) -> None:
    shape = {"n_layers": 3, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 100}
    config, n = RecurrentTransformerConfig(recurrent_layers=layers, backend="naive", **shape), 9
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        RecurrentTransformer(config)(torch.zeros(2, n, dtype=torch.int64))
    plain = sum(not config.is_recurrent(layer) for layer in range(3))
    unseen = 2 * plain * 2 * 2 * 64 * n * (n - 1) // 2  # plain attention multiplies the pairs above the diagonal too
    assert counter.get_total_flops() == rt_cost(config, n, 2).forward_flops + unseen


def test_the_layers_of_a_recurrent_configuration_are_taken_from_it() -> None:
    shape = {"n_layers": 3, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 100}
    hybrid = RecurrentTransformerConfig(recurrent_layers=(0, 2), **shape)
    assert rt_cost(hybrid, 50) == rt_cost(SMALL, 50, recurrent_layers=[0, 2])
    assert rt_cost(RecurrentTransformerConfig(**shape), 50) == rt_cost(SMALL, 50)
    assert transformer_cost(hybrid, 50) == transformer_cost(SMALL, 50)
    assert sum(p.numel() for p in RecurrentTransformer(hybrid).parameters()) == rt_cost(hybrid, 50).params


def test_a_wavefront_has_fewer_steps_in_sequence_and_pulls() -> None:
    twelve = preset("olmo-150m", n_layers=12)
    layered, wave = rt_cost(twelve, 512), rt_cost(twelve, 512, wavefront=8)
    assert (layered.sequential_steps, wave.sequential_steps) == (12 * 512, 512 + 11 * 8)
    pulled = rt_cost(twelve, 512, schedule="pull", base=8)
    assert replace(wave, sequential_steps=layered.sequential_steps) == pulled
    assert rt_cost(twelve, 5, wavefront=8).sequential_steps == 12 * 5  # one block
    seven = replace(SMALL, n_layers=7)
    runs = rt_cost(seven, 100, recurrent_layers=(0, 1, 3, 5, 6), wavefront=10)
    assert runs.sequential_steps == 2 + (100 + 10) + 100 + (100 + 10)
    assert rt_cost(SMALL, 100, recurrent_layers=(), wavefront=10).sequential_steps == 3


def test_a_transformer_costs_what_the_core_counts() -> None:
    ledger = transformer_cost(SMALL, 100, 7)
    assert ledger.forward_flops == 7 * forward_flops(SMALL, 100)
    assert ledger.training_flops_per_token == training_flops_per_token(SMALL, 100)
    assert ledger == rt_cost(SMALL, 100, 7, recurrent_layers=())
    # Every weight of the layers but the norms is read once.
    matrices = [p for p in Transformer(SMALL).model["layers"].parameters() if p.ndim == 2]
    assert ledger.weight_bytes == 2 * sum(p.numel() for p in matrices)
    assert ledger.attention_bytes == 7 * 100 * 3 * 2 * (2 * 64 + 2 * 32)


def test_traffic_of_one_layer_of_the_papers_model() -> None:
    one = preset("olmo-150m", n_layers=1)
    tiled, naive = rt_cost(one, 512, 512), rt_cost(one, 512, 512, base=512)
    once = transformer_cost(one, 512, 512).attention_bytes
    assert tiled.attention_bytes - once == (14 * 64 + 16) * 2304 * 512 * 16  # 17.2 GB
    assert naive.attention_bytes - once == 4 * 64 * 130_816 * 512 * 16  # 274 GB
    # Output projection, MLP and second projections, 11 D^2, at each of 512 positions; the first 3 D^2 once.
    assert tiled.weight_bytes == 2 * 1024**2 * (512 * 11 + 3)
    assert tiled.bytes_per_token == (tiled.weight_bytes + tiled.attention_bytes) / (512 * 512)


def test_blocks_read_rows_instead_of_tiles() -> None:
    assert tile_rows(100, 128) == (4950, 0)
    assert tile_rows(100, 10, "pull") == (10 * 45 + 10 * 45, 90)
    assert tile_rows(100, 1, "pull") == (4950, 99)
    assert rt_cost(SMALL, 1).attention_bytes == transformer_cost(SMALL, 1).attention_bytes


def test_cache_of_fewer_wider_layers() -> None:
    twelve, six = preset("olmo-300m-12l"), preset("olmo-300m-6l")
    assert rt_cost(six, 1).kv_bytes_per_token / rt_cost(twelve, 1).kv_bytes_per_token == pytest.approx(0.727, abs=1e-3)


def test_bytes_of_a_decoding_step() -> None:
    weights = rt_cost(SMALL, 1).params - 128 * 64
    assert decode_bytes(SMALL, 0) == 2 * (weights + 64)
    assert decode_bytes(SMALL, 10, 3) == 2 * (weights + 3 * 64) + 30 * 2 * 2 * 3 * 32
    assert decode_bytes(SMALL, 0, 1000) == 2 * rt_cost(SMALL, 1).params
    tied = preset("test-tiny")
    assert decode_bytes(tied, 5, dtype=torch.float32) == 4 * 131_456 + 5 * 512


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 0}, r"seq_len: got 0"),
        ({"seq_len": 8, "batch": 0}, r"batch: got 0"),
        ({"seq_len": 8, "base": 0}, r"base: got 0"),
        ({"seq_len": 8, "wavefront": -1}, r"wavefront: got -1"),
        ({"seq_len": 8, "schedule": "row"}, r"schedule: got 'row'"),
        ({"seq_len": 8.0}, r"seq_len: got 8.0"),
        ({"seq_len": 8, "recurrent_layers": [3]}, r"recurrent_layers: got \[3\], expected different ones of 0 to 2"),
        ({"seq_len": 8, "recurrent_layers": [1, 1]}, r"recurrent_layers: got \[1, 1\]"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rt_cost(SMALL, **arguments)


def test_a_bidirectional_model_has_no_recurrent_twin() -> None:
    with pytest.raises(ConfigError, match=r"causal: got a bidirectional model"):
        rt_cost(TransformerConfig(causal=False), 8)
    with pytest.raises(ConfigError, match=r"context: got -1"):
        decode_bytes(SMALL, -1)
