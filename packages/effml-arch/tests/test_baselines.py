from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from effml_arch.recurrent import RecurrentTransformer, RecurrentTransformerConfig, convert_transformer
from effml_shared.errors import ConfigError
from effml_shared.generation import generate
from effml_shared.transformer import Transformer, TransformerConfig

transformers = pytest.importorskip("transformers")
baselines = pytest.importorskip("effml_arch.hugging_face.baselines", exc_type=ImportError)

LLAMA = TransformerConfig(
    n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=176, vocab_size=120, norm_eps=1e-5, rope_base=5e3
)
QWEN3 = replace(LLAMA, qk_norm="head")
OLMO2 = replace(LLAMA, qk_norm="full", norm_position="post")
FAMILIES = {"LlamaForCausalLM": LLAMA, "Qwen3ForCausalLM": QWEN3, "Olmo2ForCausalLM": OLMO2}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_computes_the_same(family: str, tied: bool) -> None:
    model = Transformer(replace(FAMILIES[family], tied=tied), seed=1)
    for name, parameter in model.named_parameters():  # scales other than 1 tell norms apart
        if parameter.ndim == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
    theirs = baselines.to_hugging_face(model)
    assert type(theirs).__name__ == family
    ids = torch.randint(120, (2, 40), generator=torch.Generator().manual_seed(0))
    ours = model(ids).logits[..., :120]
    assert theirs(ids).logits.shape == ours.shape  # without rows that pad the vocabulary
    torch.testing.assert_close(theirs(ids).logits, ours, rtol=0, atol=2e-5)
    back = baselines.from_hugging_face(theirs)
    assert torch.equal(back(ids).logits, ours)
    expected = generate(model, ids[:, :5], max_new_tokens=8).ids
    assert torch.equal(theirs.generate(ids[:, :5], max_new_tokens=8, do_sample=False), expected)


def test_copies_type_mode_and_biases() -> None:
    model = Transformer(replace(LLAMA, mlp_bias=True), seed=1).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.fill_(0.3)
    theirs = baselines.to_hugging_face(model, max_position_embeddings=77)
    assert (theirs.dtype, theirs.training, theirs.config.max_position_embeddings) == (torch.float64, False, 77)
    ids = torch.arange(12)[None]
    # Norms and angles are in float32 there.
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits[..., :120], rtol=0, atol=2e-5)
    with torch.no_grad():
        theirs.model.norm.weight.zero_()
    assert model.model["norm"].weight.all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"causal": False}, r"causal: got False, expected True"),
        ({"position": "alibi"}, r"position: got 'alibi', expected 'rope'"),
        ({"norm": "layer"}, r"norm: got 'layer', expected 'rms'"),
        ({"mlp": "gelu"}, r"mlp: got 'gelu', expected 'swiglu'"),
        ({"residual_scale": "depth"}, r"residual_scale: got 'depth', expected 'none'"),
        ({"qk_norm": "full"}, r"qk_norm: got 'full' with 'pre' norms, expected 'none' with 'pre', 'head' with 'pre'"),
        ({"norm_position": "post"}, r"qk_norm: got 'none' with 'post' norms"),
        ({"qk_norm": "head", "mlp_bias": True}, r"mlp_bias: got True, expected False for Qwen3"),
    ],
)
def test_other_mathematics_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        baselines.to_hugging_face(Transformer(replace(LLAMA, **changes)))


def test_other_models_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"model: got a RecurrentTransformer, expected a plain Transformer"):
        baselines.to_hugging_face(RecurrentTransformer(RecurrentTransformerConfig(n_layers=1, d_model=16)))


SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@torch.no_grad()
def test_a_pretrained_model_becomes_a_recurrent_one() -> None:
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    baseline = baselines.from_hugging_face(llama)
    assert not baseline.training
    ids = torch.randint(60, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = llama(ids).logits
    torch.testing.assert_close(baseline(ids).logits, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(convert_transformer(baseline, write_mix=0.0)(ids).logits, expected, rtol=0, atol=2e-6)
    baseline.model["norm"].weight.zero_()
    assert torch.equal(llama(ids).logits, expected)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("Llama", {"hidden_act": "gelu"}, r"hidden_act: got 'gelu', expected 'silu'"),
        ("Llama", {"attention_bias": True}, r"attention_bias: got True, expected False"),
        ("Llama", {"attention_dropout": 0.1}, r"attention_dropout: got 0.1, expected 0"),
        ("Qwen3", {"head_dim": 16}, r"head_dim: got 16, expected 8"),
        ("Qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4}, r"sliding_window: got 4"),
        ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"rope_type: got 'linear'"),
        ("Mistral", {}, r"model: got a MistralForCausalLM, expected one of LlamaForCausalLM, Qwen3ForCausalLM"),
    ],
)
def test_variants_that_we_do_not_have_are_refused(family: str, fields: dict[str, Any], message: str) -> None:
    config = getattr(transformers, f"{family}Config")(**{**SIZES, "pad_token_id": None, **fields})
    with pytest.raises(ConfigError, match=message):
        baselines.from_hugging_face(getattr(transformers, f"{family}ForCausalLM")(config))
