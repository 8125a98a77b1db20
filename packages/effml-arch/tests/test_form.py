from __future__ import annotations

import copy
from typing import Any

import pytest
import torch.nn.functional as F
from effml_arch.recurrent.form import Form, form_of, weights_of
from effml_shared.errors import ConfigError
from effml_shared.layers import Block, TransformerConfig
from torch import nn

BASE: dict[str, Any] = {"n_layers": 3, "d_model": 12, "n_heads": 6, "d_ff": 20, "residual_scale": "depth"}


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": "head", "mlp": "swiglu", "mlp_bias": True},
        {"norm": "layer", "qk_norm": "full", "mlp": "gelu", "norm_eps": 1 / 3},
        {"mlp": "gelu_tanh", "mlp_bias": True},
        {"mlp": "relu"},
    ],
)
def test_a_form_names_all_weights_but_those_of_queries_and_survives_its_string(options: dict[str, Any]) -> None:
    block = copy.deepcopy(Block(TransformerConfig(**{**BASE, **options})))
    form = form_of(block, dropout=0.1, alibi=True, window=7, write_mix=1 / 3, base_block=5, schedule="pull")
    assert Form.from_spec(form.spec) == form
    assert form_of(block).window == 0
    expected = {name: p for name, p in block.named_parameters() if "q_" not in name}
    assert len(form.weights) == len(set(form.weights))
    assert set(form.weights) == set(expected)
    for name, weight in zip(form.weights, weights_of(block, form), strict=True):
        assert weight.data_ptr() == expected[name].data_ptr()
        assert not weight.requires_grad


def test_norms_may_be_left_out() -> None:
    block = Block(TransformerConfig(**BASE))
    block.input_layernorm = block.post_attention_layernorm = nn.Identity()  # type: ignore[assignment]
    form = form_of(block)
    assert (form.source_norm, form.key_norm, form.mlp_norm) == ("Identity",) * 3
    assert not any("norm" in name for name in form.weights)


@pytest.mark.parametrize(
    ("name", "part", "message"),
    [
        ("mlp.activation", F.tanh, r"mlp.activation: got .*, expected one of the shared MLP's, or backend='naive'"),
        (
            "input_layernorm",
            nn.RMSNorm(12),
            r"input_layernorm: got RMSNorm, expected RMSNorm, LayerNorm or nn.Identity",
        ),
        ("mlp.gate_proj", nn.Sequential(), r"mlp.gate_proj: got Sequential, expected nn.Linear, or backend='naive'"),
        ("self_attn.v_proj", nn.Identity(), r"v_proj: got Identity, expected nn.Linear"),
        ("self_attn.o_proj", nn.Linear(12, 12), r"o_proj.bias: got Parameter, expected None, or backend='naive'"),
    ],
)
def test_a_replaced_part_is_named(name: str, part: Any, message: str) -> None:
    block = Block(TransformerConfig(**BASE))
    parent, _, own = name.rpartition(".")
    setattr(block.get_submodule(parent), own, part)
    with pytest.raises(ConfigError, match=message):
        form_of(block)
