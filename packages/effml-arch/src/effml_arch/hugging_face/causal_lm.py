"""The Recurrent Transformer (arXiv 2604.21215) as a causal model of Hugging Face's transformers.

Parameters have the names of `RecurrentTransformer`, and one safetensors file serves both: a tied head is not stored,
nor is there a second name for it. Trained by transformers' Trainer, decoded by its `generate` in all modes that keep a
DynamicCache (greedy, sampling, beams, prompt lookup). Cost: that of `RecurrentTransformer`; the loss is computed from
the logits of all positions, (batch, seq, vocab_size) numbers, as transformers does, where ours goes by chunks.
"""

from __future__ import annotations

import warnings
from copy import copy
from types import SimpleNamespace
from typing import Any, cast

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.kv_cache import KVCache
from effml_shared.tensors import IGNORE_INDEX
from effml_shared.transformer import initialize
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from effml_arch.hugging_face.configuration import HFRecurrentTransformerConfig
from effml_arch.hugging_face.dynamic_cache import BorrowedCache
from effml_arch.recurrent.layer import RecurrentTransformerConfig, RecurrentTransformerLayer
from effml_arch.recurrent.model import RecurrentTransformer

__all__ = ["RecurrentTransformerForCausalLM"]


class RecurrentTransformerForCausalLM(PreTrainedModel, GenerationMixin):
    """A Recurrent Transformer for transformers' `generate`, Trainer and hub.

    A new model has the parameters of `RecurrentTransformer(config.to_effml(), seed=torch.initial_seed())`.

    >>> config = HFRecurrentTransformerConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50)
    >>> model = RecurrentTransformerForCausalLM(config)
    >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape
    torch.Size([1, 7])
    """

    config_class = HFRecurrentTransformerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ("RecurrentTransformerLayer", "Block")
    _skip_keys_device_placement = ("past_key_values",)
    _shell: RecurrentTransformer

    def __init__(self, config: HFRecurrentTransformerConfig) -> None:
        super().__init__(config)
        device = torch.get_default_device()
        with torch.device("meta"):
            core = RecurrentTransformer(config.to_effml())
        if device.type != "meta":
            core.to_empty(device=device)
        self._adopt(core)
        self.post_init()  # calls `_init_weights`

    @classmethod
    def from_effml(cls, model: RecurrentTransformer, **kwargs: Any) -> RecurrentTransformerForCausalLM:
        """Return a model of the same parameters, not copies; the arguments are fields that only transformers has."""
        config = HFRecurrentTransformerConfig.from_effml(cast(RecurrentTransformerConfig, model.config), **kwargs)
        config.write_mix = _write_mix(model, config.write_mix)
        with torch.device("meta"):
            wrapper = cls(config)
        wrapper._adopt(model)
        wrapper.training = model.training
        return wrapper

    def to_effml(self) -> RecurrentTransformer:
        """Return a `RecurrentTransformer` of the same parameters, not copies."""
        core = copy(self._shell)
        core._modules, core.training, core.config = {}, self.training, self.config.to_effml()
        core.model, core.lm_head = self.model, self.lm_head
        return core

    def _adopt(self, core: RecurrentTransformer) -> None:
        """Take over the modules of a model, and keep the rest of it, without them, to call them by.

        They belong to this model alone, so that what replaces one of them here is what the next pass calls, and a
        replica of this model calls its own.
        """
        self.model, self.lm_head = core.model, core.lm_head
        shell = copy(core)
        shell._modules = {}
        object.__setattr__(self, "_shell", shell)  # not as a part of this module

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Return transformers' `CausalLMOutputWithPast`, its logits (batch, seq or logits_to_keep, vocab_size).

        Args:
            input_ids: (batch, seq), or in its place inputs_embeds: (batch, seq, hidden_size).
            attention_mask: (batch, past + seq), zero at padding, for all tokens that the cache holds too.
            position_ids: (batch or 1, seq), for RoPE; by default real tokens are counted from 0. Where neither mask nor
                cache is given, a document begins wherever they do not count on by 1, as in a packed batch.
            past_key_values: a DynamicCache of the tokens before these, which takes these in.
            labels: (batch, seq), -100 where not counted, shifted in here. As everywhere in effml a token after padding
                or at the start of a document is not counted: nothing before it predicts it.
            use_cache: return a cache; by default as configured, and never with gradients.
            output_hidden_states: return the input of every layer and the normed output.
            return_dict: False for a tuple.
            logits_to_keep: at how many last positions to compute logits; 0: at all.
            kwargs: for the loss, such as `num_items_in_batch` of the Trainer, by which it divides the summed loss.

        Raises:
            ConfigError: shapes disagree, the cache is of another kind, gradients are asked for with a cache, or
                attention weights, which no layer ever forms.
        """
        config = self.config
        if config.output_attentions if output_attentions is None else output_attentions:
            raise ConfigError("output_attentions: got True, expected False: no layer forms all attention weights")
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        check_count("logits_to_keep", logits_to_keep, 0)
        if labels is not None and logits_to_keep:
            raise ConfigError(f"logits_to_keep: got {logits_to_keep} with labels, expected 0, all of them")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None:
            raise ConfigError("input_ids: got neither input_ids nor inputs_embeds, expected one of them")
        if labels is not None and labels.shape != given.shape[:2]:
            got, expected = tuple(labels.shape), tuple(given.shape[:2])
            raise ConfigError(f"labels: got shape {got}, expected (batch, seq)={expected}")
        mask = None if attention_mask is None else attention_mask.bool()
        doc_ids = None
        if past_key_values is None:
            if mask is None and position_ids is not None:
                doc_ids = _documents(position_ids, len(given))
            if use_cache is None:
                use_cache = config.use_cache and doc_ids is None and not torch.is_grad_enabled()
            past_key_values = DynamicCache() if use_cache else None
        cache = None
        if past_key_values is not None:
            cache = BorrowedCache(past_key_values, config.num_hidden_layers, mask)
            shape = (given.shape[0], cache.length + given.shape[1])
            if mask is not None and tuple(mask.shape) != shape:
                raise ConfigError(
                    f"attention_mask: got shape {tuple(mask.shape)}, expected (batch, past + seq)={shape}"
                )
        output = self.to_effml()(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=mask if cache is None else None,  # else the cache has it
            position_ids=position_ids,
            doc_ids=doc_ids,
            cache=cast(KVCache, cache),
            logits_to_keep=logits_to_keep,
            hidden_states=bool(output_hidden_states),
        )
        logits = cast(Tensor, output.logits)
        loss = None
        if labels is not None:
            labels = _counted(labels, None if mask is None else mask[:, -labels.shape[1] :], doc_ids)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits[..., : config.vocab_size],
            past_key_values=past_key_values,
            hidden_states=output.hidden_states or None,
        )
        return result if (config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with the write_mix that the layers have by now.

        Raises:
            ConfigError: they have different ones.
        """
        self.config.write_mix = _write_mix(self, self.config.write_mix)
        super().save_pretrained(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize embedding and head as transformers does; rows that were padding of the vocabulary count as rows."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.config.vocab_rows = embedding.weight.shape[0]
        return embedding

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Warn and do nothing: a layer keeps little as it is, and would have to run its sequential pass twice."""
        warnings.warn("gradient checkpointing is left off: recurrent layers recompute by themselves", stacklevel=2)

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the parameters of one module that no file has set, each from the stream of its full name."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        drawn = [
            (names.get(id(parameter), name), parameter)
            for name, parameter in module.named_parameters(recurse=False)
            if not getattr(parameter, "_is_hf_initialized", False)
        ]
        named = cast(nn.Module, SimpleNamespace(named_parameters=lambda: drawn))
        initialize(named, self.config.to_effml(), torch.initial_seed())


def _write_mix(model: nn.Module, default: float) -> float:
    """Return what `set_write_mix` last set; default: without recurrent layers."""
    found = {layer.write_mix for layer in model.modules() if isinstance(layer, RecurrentTransformerLayer)} or {default}
    if len(found) > 1:
        raise ConfigError(f"write_mix: got {sorted(found)} in different layers, expected one for all")
    return found.pop()


def _documents(position_ids: Tensor, batch: int) -> Tensor | None:
    """Return which document each token is in (batch, seq), if position_ids count several."""
    starts = position_ids.diff(dim=-1) != 1
    if not starts.any():
        return None
    return nn.functional.pad(starts.long().cumsum(-1), (1, 0)).expand(batch, -1)


def _counted(labels: Tensor, mask: Tensor | None, doc_ids: Tensor | None) -> Tensor:
    """Return labels (batch, seq) without padding and what follows padding or another document."""
    counted = torch.ones_like(labels, dtype=torch.bool)
    if mask is not None:
        counted &= mask
        counted[:, 1:] &= mask[:, :-1]
    if doc_ids is not None:
        counted[:, 1:] &= doc_ids.diff() == 0
    return labels.masked_fill(~counted, IGNORE_INDEX)
