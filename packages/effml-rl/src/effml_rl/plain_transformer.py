"""Recognise models that compute what a `Transformer` of effml does, so that other code may compute it for them.

They are a `Transformer` itself and, of Hugging Face, `LlamaForCausalLM` with unscaled rotary positions, whose
parameters have the same names. A subclass, a module of another type inside (an adapter, a quantized layer, a
parametrization), a hook, a forward pass replaced on an instance: each may compute something else, and such models are
not recognised.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from effml_shared.layers import MLP, Attention, Block, LayerNorm, RMSNorm
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn

__all__ = ["PlainTransformer", "plain_transformer"]

_CONTAINERS = (nn.Linear, nn.Embedding, nn.ModuleDict, nn.ModuleList, nn.Identity, nn.Dropout)
_OWN = {Transformer, Block, Attention, MLP, RMSNorm, LayerNorm, *_CONTAINERS}
_LLAMA = "transformers.models.llama.modeling_llama"


class PlainTransformer(NamedTuple):
    """A causal Transformer without its modules."""

    config: TransformerConfig
    weights: dict[str, Tensor]  # under the names of `Transformer.state_dict`


def plain_transformer(model: nn.Module) -> PlainTransformer | None:
    """Return a model's configuration and its weights, which are not copies; None where it is not recognised."""
    modules = list(model.modules())
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules):
        return None
    if type(model) is Transformer:
        known = model.config.causal and all(type(module) in _OWN for module in modules)
        return PlainTransformer(model.config, model.state_dict()) if known else None
    if type(model).__module__ != _LLAMA or type(model).__name__ != "LlamaForCausalLM":
        return None
    config = _llama(model.config)
    if config is None or not all(type(m) in _CONTAINERS or type(m).__module__ == _LLAMA or _silu(m) for m in modules):
        return None
    return PlainTransformer(config, model.state_dict())


def _silu(module: nn.Module) -> bool:
    return type(module).__name__ in ("SiLU", "SiLUActivation")


def _llama(theirs: Any) -> TransformerConfig | None:
    """Return the configuration of a Llama, whichever release of transformers wrote it; None where ours has no word."""
    rope = dict(getattr(theirs, "rope_parameters", None) or getattr(theirs, "rope_scaling", None) or {})
    kind = rope.pop("rope_type", "default")
    base = rope.pop("rope_theta", getattr(theirs, "rope_theta", None))
    width = theirs.num_attention_heads * (
        getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    )
    if kind != "default" or rope or base is None or theirs.hidden_act != "silu" or theirs.attention_bias:
        return None
    if width != theirs.hidden_size:
        return None
    return TransformerConfig(
        n_layers=theirs.num_hidden_layers,
        d_model=theirs.hidden_size,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        d_ff=theirs.intermediate_size,
        vocab_size=theirs.vocab_size,
        vocab_rows=theirs.vocab_size,
        rope_base=base,
        norm_eps=theirs.rms_norm_eps,
        mlp_bias=theirs.mlp_bias,
    )
