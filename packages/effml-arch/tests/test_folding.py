from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_arch.recurrent.folding import FoldedBlock, Norm
from effml_shared.layers import Block, Context, LayerNorm, RMSNorm, TransformerConfig, rotary_tables
from torch import nn

BASE = {"n_layers": 3, "d_model": 12, "n_heads": 6, "n_kv_heads": 3, "d_ff": 20, "residual_scale": "depth"}
VARIANTS: dict[str, dict[str, Any]] = {
    "rope": {"qk_norm": "head", "mlp": "swiglu", "mlp_bias": True},
    "layer": {"norm": "layer", "qk_norm": "full", "mlp": "gelu", "mlp_bias": True},
    "head": {"norm": "layer", "qk_norm": "head", "mlp": "gelu_tanh", "position": "none"},
    "full": {"qk_norm": "full", "mlp": "relu"},
    "plain": {"position": "none", "mlp": "swiglu"},
}


def make(**options: Any) -> Block:
    torch.manual_seed(0)
    block = Block(TransformerConfig(**{**BASE, **options})).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return block.requires_grad_(False)


@pytest.mark.parametrize("name", VARIANTS)
def test_folded_matrices_compute_what_the_modules_do(name: str) -> None:
    options = VARIANTS[name]
    block, x, a = make(**options), torch.randn(2, 4, 12).double(), torch.randn(2, 4, 12).double()
    rotary = None if options.get("position") else rotary_tables(torch.arange(4)[None], 2, 1e4, torch.float64)
    folded = FoldedBlock.of(block, torch.float64)
    u = x + block.scale * block.self_attn.o_proj(a)
    z = u + block.scale * block.mlp(block.post_attention_layernorm(u))
    keys, values = block.self_attn.key_value(block.input_layernorm(x), Context(rotary=rotary))
    cos, sin = folded.key_tables(rotary, x)
    for t in range(4):
        torch.testing.assert_close(folded.finish(x[:, t], a[:, t]), z[:, t], rtol=0, atol=1e-13)
        k, v = torch.zeros(6, 3, 2).double(), torch.zeros(6, 2).double()
        at = tuple(table if table is None else table[min(t, len(table) - 1)] for table in (cos, sin))
        folded.persist(x[:, t], at, k[:, 1], v)  # type: ignore[arg-type]
        torch.testing.assert_close(k[:, 1], keys[:, :, t].flatten(0, 1), rtol=0, atol=1e-13)
        torch.testing.assert_close(v, values[:, :, t].flatten(0, 1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("module", [RMSNorm(6, 1e-3), LayerNorm(6, 1e-3), nn.Identity()])
def test_all_norms_have_one_product_with_a_vector(module: nn.Module) -> None:
    norm, x = Norm.of(module), torch.randn(4, 6).double().requires_grad_()
    d = norm.fold(torch.randn(4, 6).double(), None)
    (expected,) = torch.autograd.grad((norm(x) * d).sum(), x)
    normed, r, unit = norm.split(x)
    torch.testing.assert_close(normed, norm(x), rtol=0, atol=1e-14)
    got = r * (d - unit * (d * unit).sum(-1, keepdim=True))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
