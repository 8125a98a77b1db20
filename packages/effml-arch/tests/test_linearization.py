from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_arch.recurrent.folding import FoldedBlock
from effml_arch.recurrent.linearization import Linearization
from effml_shared.layers import Block, Context, TransformerConfig, rotary_tables

BASE = {"n_layers": 3, "d_model": 12, "n_heads": 6, "n_kv_heads": 3, "d_ff": 20, "residual_scale": "depth"}
VARIANTS: dict[str, dict[str, Any]] = {
    "rope": {"qk_norm": "head", "mlp": "swiglu", "mlp_bias": True},
    "layer": {"norm": "layer", "qk_norm": "full", "mlp": "gelu", "mlp_bias": True},
    "head": {"norm": "layer", "qk_norm": "head", "mlp": "gelu_tanh", "position": "none"},
    "full": {"qk_norm": "full", "mlp": "relu"},
    "plain": {"position": "none", "mlp": "swiglu"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_products_are_those_of_autograd(name: str) -> None:
    torch.manual_seed(0)
    options, n, batch, mix = VARIANTS[name], 4, 2, 0.7
    block = Block(TransformerConfig(**{**BASE, **options})).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    rotary = None if options.get("position") else rotary_tables(torch.arange(n)[None], 2, 1e4, torch.float64)
    x, a, z = (torch.randn(batch, n, 12).double() for _ in range(3))
    dk, dv = (torch.randn(batch, 3, n, 2).double() for _ in range(2))
    dz = torch.randn(batch, n, 12).double()

    a, z = a.requires_grad_(), z.requires_grad_()
    u = x + block.scale * block.self_attn.o_proj(a)
    out = u + block.scale * block.mlp(block.post_attention_layernorm(u))
    (to_heads,) = torch.autograd.grad((out * dz).sum(), a)
    source = torch.lerp(x, z, mix)
    k, v = block.self_attn.key_value(block.input_layernorm(source), Context(rotary=rotary))
    (to_outputs,) = torch.autograd.grad((k * dk).sum() + (v * dv).sum(), z)

    by_position = [t.detach().transpose(0, 1) for t in (x, a, source)]
    folded = FoldedBlock.of(block, torch.float64)
    linear = Linearization(folded, *by_position, k.detach().permute(2, 0, 1, 3), rotary, mix)
    for t in range(n):
        torch.testing.assert_close(linear.to_heads(t, dz[:, t]), to_heads[:, t], rtol=0, atol=1e-12)
        total = dz[:, t].clone()
        linear.to_sources(t, dk[:, :, t], dv[:, :, t], total)
        torch.testing.assert_close(total - dz[:, t], to_outputs[:, t], rtol=0, atol=1e-12)
