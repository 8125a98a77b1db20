from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_arch.recurrent.attention_state import group_queries
from effml_arch.recurrent.folding import FoldedBlock
from effml_arch.recurrent.layer import RecurrentTransformerConfig, RecurrentTransformerLayer
from effml_arch.recurrent.stacking import StackedBlocks
from effml_shared.layers import Context, rotary_tables
from torch import Tensor

VARIANTS: dict[str, dict[str, Any]] = {
    "rms_head_swiglu": {"qk_norm": "head"},
    "layer_full_gelu": {"norm": "layer", "qk_norm": "full", "mlp": "gelu", "mlp_bias": True, "position": "none"},
    "none_relu": {"mlp": "relu", "n_kv_heads": 4, "residual_scale": "depth"},
}
LAYERS, BATCH, N = 3, 2, 4


@pytest.fixture(params=VARIANTS)
def layers(request: pytest.FixtureRequest) -> list[RecurrentTransformerLayer]:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"n_layers": LAYERS, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24}
    config = RecurrentTransformerConfig(**{**shape, **VARIANTS[request.param]})
    made = [RecurrentTransformerLayer(config, i).double().requires_grad_(False) for i in range(LAYERS)]
    for layer in made:
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made


def tables(layer: RecurrentTransformerLayer) -> tuple[Tensor, Tensor] | None:
    """Return angles that differ by layer and sequence."""
    if layer.config.position != "rope":
        return None
    positions = torch.randint(100, (LAYERS * BATCH, N), generator=torch.Generator().manual_seed(0))
    return rotary_tables(positions, 4, 10_000.0, torch.float64)


def of_layer(rotary: tuple[Tensor, Tensor] | None, i: int) -> tuple[Tensor, Tensor] | None:
    return None if rotary is None else (rotary[0][i * BATCH :][:BATCH], rotary[1][i * BATCH :][:BATCH])


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_queries_and_own_pairs_are_those_of_each_layer(layers: list[RecurrentTransformerLayer]) -> None:
    stack, rotary = StackedBlocks(layers, torch.float64), tables(layers[0])
    x = torch.randn(N, LAYERS, BATCH, 16).double()
    got = [t.unflatten(0, (LAYERS, -1)) for t in stack.queries(x, rotary)]
    for i, layer in enumerate(layers):
        h, context = layer.input_layernorm(x[:, i].transpose(0, 1)), Context(rotary=of_layer(rotary, i))
        k, v = layer.self_attn.key_value(h, context)
        close(got[0][i], group_queries(layer.self_attn.query(h, context), k.shape[1]) * 4**-0.5)
        close(got[1][i], k.flatten(0, 1))
        close(got[2][i], v.flatten(0, 1))


def test_a_position_is_that_of_each_layer_and_parts_are_views(layers: list[RecurrentTransformerLayer]) -> None:
    stack, rotary = StackedBlocks(layers, torch.float64), tables(layers[0])
    x, heads = torch.randn(2, LAYERS * BATCH, 16).double()
    for rows in (slice(0, LAYERS), slice(1, 2), slice(1, LAYERS)):
        part, some = stack.part(rows), slice(rows.start * BATCH, rows.stop * BATCH)
        assert part.up.data_ptr() == stack.up[rows].data_ptr()
        z, kv_heads = part.finish(x[some].clone(), heads[some]), part.kv_dim // 4
        angles = None if rotary is None else (rotary[0][some], rotary[1][some])
        table = [None if t is None else t[0] for t in part.key_tables(angles, x[None, some])]
        k, v = torch.empty(2, len(z) * kv_heads, 4).double()
        part.persist(z, (table[0], table[1]), k, v)
        for i in range(rows.start, rows.stop):
            at = slice((i - rows.start) * BATCH, (i - rows.start + 1) * BATCH)
            block = FoldedBlock.of(layers[i], torch.float64)
            own = slice(i * BATCH, (i + 1) * BATCH)
            expected = block.finish(x[own].clone(), heads[own])
            close(z[at], expected)
            table = [None if t is None else t[0] for t in block.key_tables(of_layer(rotary, i), x[None, own])]
            pair = torch.empty(2, BATCH * kv_heads, 4).double()
            block.persist(expected, (table[0], table[1]), pair[0], pair[1])
            pairs = slice(at.start * kv_heads, at.stop * kv_heads)
            close(torch.stack([k[pairs], v[pairs]]), pair)
