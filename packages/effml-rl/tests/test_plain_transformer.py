"""Which models are recognised: those that compute what a Transformer does, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_rl.plain_transformer import plain_transformer
from effml_shared.layers import Block
from effml_shared.transformer import Transformer, TransformerConfig
from torch import nn
from torch.nn.utils import parametrize

CONFIG = TransformerConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, vocab_size=40)
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}


class OtherBlock(Block):
    """Could do anything."""


class Other(Transformer):
    """A subclass whose layers are others."""

    block = OtherBlock


def test_a_transformer_is_its_configuration_and_its_own_weights() -> None:
    model = Transformer(CONFIG)
    plain = plain_transformer(model)
    assert plain is not None
    assert plain.config is CONFIG
    assert plain.weights.keys() == model.state_dict().keys()
    assert plain.weights["model.norm.weight"].data_ptr() == model.get_parameter("model.norm.weight").data_ptr()


def test_what_may_compute_something_else_is_not_recognised() -> None:
    adapted, hooked, replaced, reshaped = (Transformer(CONFIG) for _ in range(4))
    adapted.lm_head = nn.Sequential(nn.Linear(32, 128))  # type: ignore[assignment]
    hooked.model["norm"].register_forward_hook(lambda *_: None)
    replaced.model["norm"].forward = lambda x: x
    parametrize.register_parametrization(reshaped.lm_head, "weight", nn.Identity())  # type: ignore[arg-type]
    bidirectional = Transformer(TransformerConfig(**{**vars(CONFIG), "causal": False}))
    for model in (adapted, hooked, replaced, reshaped, bidirectional, Other(CONFIG), nn.Linear(2, 2)):
        assert plain_transformer(model) is None


@pytest.mark.parametrize("options", [{}, {"num_key_value_heads": 2, "mlp_bias": True}, {"tie_word_embeddings": True}])
def test_llamas_compute_the_same(options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **options)).eval()
    plain = plain_transformer(theirs)
    assert plain is not None
    ours = Transformer(plain.config)
    ours.load_state_dict(plain.weights)
    ids = torch.arange(18).view(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


def test_llamas_that_scale_positions_or_have_biases_are_not_recognised() -> None:
    transformers = pytest.importorskip("transformers")
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    for options in ({"rope_scaling": scaled}, {"attention_bias": True}, {"head_dim": 16}, {"hidden_act": "gelu"}):
        assert plain_transformer(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, **options))) is None
    gpt = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=4, vocab_size=40)
    assert plain_transformer(transformers.GPT2LMHeadModel(gpt)) is None
