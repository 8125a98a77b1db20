"""Baseline Transformers as classes of Hugging Face's transformers and back: to serve, to compare, to go on training.

    Llama     pre-norm, no QK-norm          Qwen 3     pre-norm, QK-norm over each head
    OLMo 2    post-norm, QK-norm over all heads; all three with RMSNorm, SwiGLU and rotary positions

Both sides compute the same function; theirs has norms and angles in float32 even in a float64 model. Parameters are
copied. Sources: LLaMA (arXiv 2302.13971), Qwen 3 (2505.09388), OLMo 2 (2501.00656).
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from effml_shared.errors import ConfigError
from effml_shared.transformer import Transformer, TransformerConfig

__all__ = ["from_hugging_face", "to_hugging_face"]

_FAMILIES = {("pre", "none"): "Llama", ("pre", "head"): "Qwen3", ("post", "full"): "Olmo2"}
_NEEDED = {"causal": True, "position": "rope", "norm": "rms", "mlp": "swiglu", "residual_scale": "none"}
_OLMO2_NAMES = (  # the second must not find what the first has made
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_attention_layernorm"),
)


def to_hugging_face(model: Transformer, *, max_position_embeddings: int = 2048) -> Any:
    """Return a causal model of transformers that computes what a baseline does, in its type and on its device.

    Args:
        model: a plain `Transformer`. Rows that pad its vocabulary are left out; dropout, if any, has no counterpart.
        max_position_embeddings: a number that only other programs read; positions are unbounded.

    Raises:
        ConfigError: no class of transformers computes this.

    >>> import torch
    >>> config = TransformerConfig(n_layers=1, d_model=32, vocab_size=50, qk_norm="head")
    >>> type(to_hugging_face(Transformer(config))).__name__
    'Qwen3ForCausalLM'
    """
    config = model.config
    if type(model) is not Transformer or type(config) is not TransformerConfig:
        raise ConfigError(f"model: got a {type(model).__name__}, expected a plain Transformer")
    for name, needed in _NEEDED.items():
        if getattr(config, name) != needed:
            raise ConfigError(f"{name}: got {getattr(config, name)!r}, expected {needed!r} for transformers")
    family = _FAMILIES.get((config.norm_position, config.qk_norm))
    if family is None:
        known = ", ".join(f"{qk_norm!r} with {position!r}" for position, qk_norm in _FAMILIES)
        raise ConfigError(f"qk_norm: got {config.qk_norm!r} with {config.norm_position!r} norms, expected {known}")
    if config.mlp_bias and family != "Llama":
        raise ConfigError(f"mlp_bias: got True, expected False for {family}")

    fields: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": max_position_embeddings,
        "mlp_bias": config.mlp_bias,
        # Both spellings: files of 5 have the first, releases of 4 read the second.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
        # Their defaults are ids of the original vocabularies, at which generation would stop or an embedding be frozen.
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    weights = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in _OLMO2_NAMES if family == "Olmo2" else ():
            name = name.replace(ours, theirs)
        rows = config.vocab_size if name in ("model.embed_tokens.weight", "lm_head.weight") else None
        weights[name] = tensor[:rows]
    if config.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    parameter = next(model.parameters())
    exported = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**fields))
    exported.to(device=parameter.device, dtype=parameter.dtype).load_state_dict(weights)
    return exported.train(model.training)


def from_hugging_face(model: Any) -> Transformer:
    """Return a baseline that computes what a causal model of transformers does, in its type and on its device.

    With `convert_transformer` a pretrained Llama or Qwen 3 so becomes a Recurrent Transformer.

    Args:
        model: a LlamaForCausalLM, Qwen3ForCausalLM or Olmo2ForCausalLM.

    Raises:
        ConfigError: it is of another class, or of a variant that a `Transformer` does not have.
    """
    variants = {f"{family}ForCausalLM": variant for variant, family in _FAMILIES.items()}
    name = type(model).__name__
    if name not in variants:
        raise ConfigError(f"model: got a {name}, expected one of {', '.join(variants)}")
    theirs, (norm_position, qk_norm) = model.config, variants[name]
    rope = getattr(theirs, "rope_parameters", None)
    if rope is None:  # a release of 4
        rope = {"rope_theta": theirs.rope_theta, **(theirs.rope_scaling or {"rope_type": "default"})}
    head_dim = theirs.hidden_size // theirs.num_attention_heads
    for field, got, needed in (
        ("hidden_act", theirs.hidden_act, "silu"),
        ("attention_bias", theirs.attention_bias, False),
        ("attention_dropout", theirs.attention_dropout, 0),
        ("head_dim", getattr(theirs, "head_dim", None) or head_dim, head_dim),
        ("sliding_window", getattr(theirs, "sliding_window", None), None),
        ("rope_type", rope.get("rope_type", "default"), "default"),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1), 1),
    ):
        if got != needed:
            raise ConfigError(f"{field}: got {got!r}, expected {needed!r} for a Transformer")
    config = TransformerConfig(
        n_layers=theirs.num_hidden_layers,
        d_model=theirs.hidden_size,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        d_ff=theirs.intermediate_size,
        vocab_size=theirs.vocab_size,
        vocab_rows=theirs.vocab_size,
        tied=theirs.tie_word_embeddings,
        rope_base=rope["rope_theta"],
        norm_eps=theirs.rms_norm_eps,
        norm_position=norm_position,
        qk_norm=qk_norm,
        mlp_bias=getattr(theirs, "mlp_bias", False),
    )
    weights = {}
    for name, tensor in model.state_dict().items():
        for new, old in reversed(_OLMO2_NAMES) if norm_position == "post" else ():
            name = name.replace(old, new)
        if not (config.tied and name == "lm_head.weight"):
            weights[name] = tensor
    with torch.device("meta"):
        baseline = Transformer(config)
    baseline.to(dtype=model.dtype).to_empty(device=model.device).load_state_dict(weights)
    return baseline.train(model.training)
