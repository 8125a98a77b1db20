from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from effml_shared.errors import ConfigError
from effml_shared.layers import (
    Attention,
    Block,
    Context,
    LayerNorm,
    RMSNorm,
    TransformerConfig,
    alibi_bias,
    rotary_tables,
    rotate,
)
from omegaconf import OmegaConf
from torch import Tensor

TINY = TransformerConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, vocab_size=50, qk_norm="head")


def waves(a: float, b: float, c: float, shape: tuple[int, int]) -> Tensor:
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in shape)
    return 0.5 * torch.sin(a * rows[:, None] + b * columns + c)


def close(got: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("causal", "loss", "first_channel"),
    [
        (True, 14.123141521719, [4.2620962335, 3.2615801286, 1.8177539390, 0.4216293252, -0.5273688535, -1.1543097723]),
        (
            False,
            12.937342695743,
            [1.0047968658, 1.2293751108, 0.5487723698, -0.6297970709, -1.3916151839, -1.1543097723],
        ),
    ],
)
def test_layer_vector(causal: bool, loss: float, first_channel: list[float]) -> None:
    config = TransformerConfig(d_model=8, n_heads=2, d_ff=16, mlp="gelu", qk_norm="head", norm_eps=1e-6, causal=causal)
    block = Block(config).double().requires_grad_(False)
    for name, constants, shape in (
        ("self_attn.q_proj", (1.3, 0.7, 0.1), (8, 8)),
        ("self_attn.k_proj", (0.9, 1.1, 0.2), (8, 8)),
        ("self_attn.v_proj", (1.7, 0.5, 0.3), (8, 8)),
        ("self_attn.o_proj", (0.6, 1.9, 0.4), (8, 8)),
        ("mlp.up_proj", (1.1, 0.8, 0.5), (16, 8)),
        ("mlp.down_proj", (0.4, 1.4, 0.6), (8, 16)),
    ):
        block.get_parameter(f"{name}.weight").copy_(waves(*constants, shape))
    t, d = torch.arange(6.0, dtype=torch.float64), torch.arange(8.0, dtype=torch.float64)
    x = torch.cos(0.3 * t[:, None] + 0.5 * d)[None]
    context = Context(rotary=rotary_tables(torch.arange(6)[None], 4, 1e4, torch.float64))
    z = block(x, context)
    assert z.square().mean().item() == pytest.approx(loss, abs=1e-11)
    close(z[0, :, 0], torch.tensor(first_channel, dtype=torch.float64), atol=1e-10)


def test_rotation_of_a_known_vector() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)[None, None, None]
    turned = rotate(x, *rotary_tables(torch.tensor([[3]]), 4, 1e4, torch.float64))
    expected = [-1.4133525208, 1.8791180667, -2.8288574817, 4.0581911354]
    close(turned[0, 0, 0], torch.tensor(expected, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("shift", [1, 100, 10_000])
def test_rotation_is_relative_and_keeps_norms(shift: int) -> None:
    q, k = torch.randn(2, 1, 1, 9, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def scores(start: int) -> Tensor:
        tables = rotary_tables(torch.arange(start, start + 9)[None], 16, 1e4, torch.float64)
        close(rotate(q, *tables).norm(dim=-1), q.norm(dim=-1))
        return rotate(q, *tables) @ rotate(k, *tables).mT

    scale = q.norm(dim=-1)[..., :, None] * k.norm(dim=-1)[..., None, :]
    assert ((scores(shift) - scores(0)).abs() <= 1e-12 * scale).all()


def test_float32_angles_stay_true_at_long_range() -> None:
    single, double = (rotary_tables(torch.tensor([[100_000]]), 128, 1e4, d) for d in (torch.float32, torch.float64))
    angle = torch.atan2(single[1].double(), single[0].double()) - torch.atan2(double[1], double[0])
    assert torch.remainder(angle + math.pi, 2 * math.pi).sub(math.pi).abs().max() < 1e-2


def test_alibi_slopes_are_not_interpolated() -> None:
    bias = alibi_bias(6, torch.tensor([[[0.0, -3.0]]], dtype=torch.float64))
    assert bias[0, :, 0, 1].tolist() == pytest.approx([-3 * 2 ** (-8 * h / 6) for h in range(1, 7)], rel=1e-15)
    assert not bias[..., 0].any()


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_norm_statistics_are_wide(kind: type[RMSNorm]) -> None:
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(0)).bfloat16() * 3 + 1
    norm = kind(512, 1e-6)
    wide = x.double() - (x.double().mean(-1, keepdim=True) if kind is LayerNorm else 0)
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert ((norm(x).double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all()  # nothing but the final rounding
    close(norm.double()(wide), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_query_that_sees_nothing_yields_zero(dtype: torch.dtype, bias: bool) -> None:
    attention = Attention(TINY).to(dtype)
    x = torch.randn(1, 4, 32, dtype=dtype, requires_grad=True)
    mask = torch.ones(4, 4, dtype=torch.bool).tril(-1)[None, None]
    floats = torch.zeros(1, 4, 4, 4).masked_fill(~mask, -math.inf)
    out = attention(x, Context(mask=floats if bias else mask))
    assert not out[:, 0].any()
    assert out[:, 1:].any()
    assert torch.autograd.grad(out.square().sum(), x)[0].isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_heads": 3, "d_model": 64}, "n_heads: got 3, expected a divisor of d_model=64"),
        ({"n_kv_heads": 3}, "n_kv_heads: got 3, expected a divisor of n_heads=4"),
        ({"d_model": 12}, "n_heads: got heads of 3 channels, expected an even number"),
        ({"position": "learned"}, "position: got 'learned', expected one of rope, alibi, none"),
        ({"resid_dropout": 1.0}, r"resid_dropout: got 1.0, expected a number in \[0, 1\)"),
        ({"mlp": "swish"}, "mlp: got 'swish', expected one of swiglu, gelu, gelu_tanh, relu"),
        ({"vocab_rows": 100}, "vocab_rows: got 100, expected at least vocab_size=256"),
        ({"n_layers": 0}, "n_layers: got 0, expected more than 0"),
        ({"n_heads": 0}, "n_heads: got 0, expected more than 0"),
        ({"d_ff": -1}, "ff_dim: got -1, expected more than 0"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TransformerConfig(**fields)


def test_config_passes_through_omegaconf() -> None:
    merged = OmegaConf.merge(OmegaConf.structured(TINY), {"d_ff": None, "rope_base": 5e5})
    assert OmegaConf.to_object(merged) == replace(TINY, d_ff=None, rope_base=5e5)
    assert TransformerConfig(**asdict(TINY)) == TINY


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_dropout_acts_on_both_branches_in_training(norm_position: str) -> None:
    config = TransformerConfig(
        n_layers=2, d_model=8, n_heads=2, position="none", norm_position=norm_position, resid_dropout=0.25
    )
    torch.manual_seed(0)
    block, x = Block(config).double().requires_grad_(False), torch.randn(64, 3, 8).double()
    plain = Block(replace(config, resid_dropout=0.0)).double()
    plain.load_state_dict(block.state_dict())
    torch.testing.assert_close(block.eval()(x, Context()), plain(x, Context()), rtol=0, atol=0)
    block.train()
    for silent in (block.mlp.down_proj, block.self_attn.o_proj):
        kept_weight = silent.weight.clone()
        silent.weight.zero_()
        expected = block.eval()(x, Context()) - x
        added = block.train()(x, Context()) - x
        kept = added != 0
        torch.testing.assert_close(added, torch.where(kept, expected / 0.75, 0.0), rtol=0, atol=1e-12)
        assert 0.65 < kept.double().mean() < 0.85
        silent.weight.copy_(kept_weight)
