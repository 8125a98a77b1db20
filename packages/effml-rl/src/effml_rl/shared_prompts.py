"""Log-probabilities of completions whose prompt is read once, however many completions it has.

An ordinary pass over n completions of one prompt reads n (P + T) tokens. Here a first pass reads each distinct prompt
and keeps its keys and values, with their gradients; a second reads the completions behind them: P + n T tokens. It is
the same function up to rounding, and both passes belong to one graph. What is paid for it is attention under a mask
in place of the causal kernel, and a copy of the prompt's keys and values per completion: on a CPU, forward and backward
pass of a small model keep nine tenths of the ratio of tokens. Where few would be spared it is not done.

For a `Transformer`, and for models of Hugging Face whose layers all attend to everything before them, with adapters of
peft or without.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from effml_shared import distributed
from effml_shared.generation import unwrap
from effml_shared.transformer import Transformer
from torch import Tensor, nn

from effml_rl.token_logps import TokenLogps, chunked_token_logps

__all__ = ["shared_prompt_logps", "worth_sharing"]

_NEEDED = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}  # of a model of Hugging Face


def worth_sharing(model: nn.Module, rows: dict[str, Tensor]) -> bool:
    """Say whether an eighth of the tokens would be spared, and the model is of a kind that can do it.

    Args:
        rows: with `group` (rows,), equal where prompts are equal; see `effml_rl.policy_passes`.
    """
    batch, prompt = rows["prompt_ids"].shape
    spared = (batch - len(rows["group"].unique())) * prompt
    return 8 * spared >= batch * (prompt + rows["completion_ids"].shape[1]) and _new_cache(model) is not None


def shared_prompt_logps(
    model: nn.Module, rows: dict[str, Tensor], *, temperature: float = 1.0, chunk: int = 1024, entropy: str = "gradient"
) -> TokenLogps:
    """Return what `effml_rl.token_logps.token_logps` would, of rows and a model that are `worth_sharing`."""
    groups, group = rows["group"].unique(return_inverse=True)
    first = (group == torch.arange(len(groups), device=group.device)[:, None]).int().argmax(1)
    prompts, real, completions = rows["prompt_ids"][first], rows["prompt_mask"][first], rows["completion_ids"]
    cache: Any = _new_cache(model)
    hugging_face = not isinstance(cache, _PromptCache)
    padded = not bool(real.all())

    options: dict[str, Any] = {"past_key_values" if hugging_face else "cache": cache}
    if padded:
        options |= {"attention_mask": real, "position_ids": (real.long().cumsum(1) - 1).clamp(min=0)}
    logits = model(prompts, **options, logits_to_keep=1).logits.index_select(0, group)
    how: dict[str, Any] = {"temperature": temperature, "chunk": chunk, "entropy": entropy}
    parts = [chunked_token_logps(logits, None, completions[:, :1], **how)]
    if completions.shape[1] > 1:
        read = completions[:, :-1]
        if hugging_face:
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.index_select(0, group), layer.values.index_select(0, group)
        else:
            cache.spread(group)
        if padded:
            real = real.index_select(0, group)
            positions = real.sum(1, keepdim=True) + torch.arange(read.shape[1], device=real.device)
            mask = F.pad(real, (0, read.shape[1]), value=True) if hugging_face else None  # ours remembers the prompts'
            options |= {"attention_mask": mask, "position_ids": positions}
        logits = model(read, **options).logits
        parts.append(chunked_token_logps(logits, None, completions[:, 1:], **how))
    return TokenLogps(*(torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)))


class _PromptCache:
    """Keys and values of prompts with their gradients, in the place of a `KVCache`, which is for inference only."""

    def __init__(self, n_layers: int) -> None:
        self.n_layers, self.length = n_layers, 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._valid: Tensor | None = None

    def mark(self, mask: Tensor) -> None:
        """Say which of the prompts' tokens are real."""
        self._valid = mask

    def key_valid(self, n_keys: int) -> Tensor | None:
        """Return which of the first n_keys slots hold real tokens; None: all."""
        return None if self._valid is None else F.pad(self._valid, (0, n_keys - self._valid.shape[1]), value=True)

    def spread(self, index: Tensor) -> None:
        """Give every completion the prompt of its index."""
        self._layers = {at: (k.index_select(0, index), v.index_select(0, index)) for at, (k, v) in self._layers.items()}
        self._valid = None if self._valid is None else self._valid.index_select(0, index)
        self.length = next(iter(self._layers.values()))[0].shape[2]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a prompt's keys and values, or put them in front of a completion's."""
        if layer not in self._layers:
            self._layers[layer] = key, value
            return key, value
        keys, values = self._layers[layer]
        return torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)


def _new_cache(model: nn.Module) -> Any:
    """Return an empty cache that gradients flow through, None for a model of which that is not known."""
    if hasattr(model, "_orig_mod"):
        return None  # torch.compile would make a graph for every cache
    inner: Any = unwrap(model)
    if distributed.is_sharded(next(inner.parameters())):
        return None  # FSDP2 expects one forward pass per backward pass
    if type(inner) is Transformer:
        return _PromptCache(inner.config.n_layers) if inner.config.causal else None
    if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        if inner.active_peft_config.is_prompt_learning:
            return None  # it puts tokens of its own before every pass
        inner = inner.get_base_model()
    takes = inspect.signature(inner.forward).parameters.keys()
    if type(inner).__module__.partition(".")[0] != "transformers" or _NEEDED - takes:
        return None
    if any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()):
        return None  # it would drop the cache
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=inner.config)
    return cache if {type(layer).__name__ for layer in cache.layers} == {"DynamicLayer"} else None
