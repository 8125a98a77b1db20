"""The baseline Transformer, causal or bidirectional, that the methods of effml build on and are compared with.

    x = embed(ids) + condition;   per layer  u = x + r Attn(norm x),  x = u + r MLP(norm u);   logits = head(norm x)

RMSNorm or LayerNorm, rotary positions (arXiv 2104.09864) or ALiBi (2108.12409), grouped queries (2305.13245), SwiGLU
(2002.05202) or GELU, QK-norm and reordered norms (OLMo 2, 2501.00656). Cost: see `effml_shared.transformer_costs`.
No buffers: the parameters are all the state, under the names of Hugging Face's Llama.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effml_shared.errors import ConfigError
from effml_shared.kv_cache import KVCache
from effml_shared.layers import Block, Context, TransformerConfig, alibi_bias, make_norm, rotary_tables, visible
from effml_shared.seeding import generator
from effml_shared.tensors import IGNORE_INDEX, chunked_cross_entropy, widen

__all__ = ["Transformer", "TransformerConfig", "TransformerOutput", "initialize"]


class TransformerOutput(NamedTuple):
    """What a `Transformer` returns: a tuple, in which DDP, FSDP2 and `torch.compile` find the tensors."""

    logits: Tensor | None = None  # (batch, seq or logits_to_keep, rows), -inf from vocab_size on; without labels
    loss_sum: Tensor | None = None  # summed nats, float32 or wider; with labels
    token_count: Tensor | None = None  # targets in that sum, int64; with labels
    hidden_states: tuple[Tensor, ...] = ()  # on request: the input of every layer, then the normed output


class Transformer(nn.Module):
    """Embedding, layers, final norm and head. A sibling changes the layer by overriding `block(config, layer)`."""

    block: type[nn.Module] = Block

    def __init__(self, config: TransformerConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        with torch.device("meta"):  # PyTorch's own initial draw would be overwritten at once
            embedding = nn.Embedding(config.rows, config.d_model)
            layers = nn.ModuleList(self.block(config, layer) for layer in range(config.n_layers))
            norm = make_norm(config, config.d_model)
            self.model = nn.ModuleDict({"embed_tokens": embedding, "layers": layers, "norm": norm})
            self.lm_head = None if config.tied else nn.Linear(config.d_model, config.rows, bias=False)
        if device.type != "meta":
            self.to_empty(device=device).reset_parameters(seed)

    def reset_parameters(self, seed: int = 0) -> None:
        """Draw all parameters as `initialize` does: what a model built on meta needs after `to_empty`."""
        initialize(self, self.config, seed)

    def new_cache(self, max_len: int | None = None) -> KVCache:
        """Return an empty cache for this model."""
        return KVCache(self.config.n_layers, max_len)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        condition: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
        labels: Tensor | None = None,
        z_loss: float = 0.0,
        loss_chunk: int = 2048,
        logits_to_keep: int = 0,
        hidden_states: bool = False,
    ) -> TransformerOutput:
        """Return the logits or, given labels, the summed loss: computed in this call, where DDP and FSDP2 need it.

        Args:
            input_ids: (batch, seq), or in its place inputs_embeds: (batch, seq, d_model).
            condition: (batch, 1 or seq, d_model), added to the embeddings.
            attention_mask: (batch, seq), zero at padding. Of these tokens only: a cache remembers its own.
            position_ids: (batch or 1, seq), for RoPE; by default real tokens are counted from 0, across documents.
            doc_ids: (batch, seq); tokens of different documents do not see each other.
            cache: holds the tokens before these and takes these in.
            labels: (batch, seq), -100 where not counted; padding never counts. A bidirectional model predicts each in
                place, a causal one from the token before, which must be real and of the same document.
            z_loss, loss_chunk: see `effml_shared.tensors.chunked_cross_entropy`.
            logits_to_keep: at how many last positions to compute logits; 0: at all.

        Raises:
            ConfigError: shapes or types disagree, ids are out of range (seen on a CPU only), or a cache is too short or
                meets right padding.
        """
        x = self._embed(input_ids, inputs_embeds)
        mask = None if attention_mask is None else attention_mask.bool()
        batch, seq, dim = x.shape
        for name, given, *shapes in (
            ("condition", condition, (batch, seq, dim), (batch, 1, dim)),
            ("attention_mask", mask, (batch, seq)),
            ("position_ids", position_ids, (batch, seq), (1, seq)),
            ("doc_ids", doc_ids, (batch, seq)),
            ("labels", labels, (batch, seq)),
        ):
            if given is not None and tuple(given.shape) not in shapes:
                expected = " or ".join(map(str, shapes))
                raise ConfigError(f"{name}: got shape {tuple(given.shape)}, expected {expected}")
        if labels is not None and labels.dtype != torch.int64:
            raise ConfigError(f"labels: got {labels.dtype}, expected int64")
        x = x if condition is None else x + condition
        context = self._context(x, mask, position_ids, doc_ids, cache)
        *states, x = self._states(x, context)
        x = self.model["norm"](x)
        kept = (*states, x) if hidden_states else ()

        vocab_size = self.config.vocab_size
        # Called as a module, since others may have put more than a product there; a tied head is only a weight.
        head: Any = self.lm_head if self.lm_head is not None else self.model["embed_tokens"].weight
        if labels is None:
            kept_x = x[:, -logits_to_keep:]
            logits = F.linear(kept_x, head) if isinstance(head, Tensor) else head(kept_x)
            logits[..., vocab_size:] = -math.inf
            return TransformerOutput(logits=logits, hidden_states=kept)
        counted = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
        if self.config.causal:
            x, labels, counted = x[:, :-1], labels[:, 1:], counted[:, 1:] & counted[:, :-1]
            counted = counted if doc_ids is None else counted & (doc_ids.diff() == 0)
        targets = labels.masked_fill(~counted, IGNORE_INDEX)
        loss = chunked_cross_entropy(x, head, targets, chunk=loss_chunk, vocab_size=vocab_size, z_loss=z_loss)
        return TransformerOutput(None, *loss, hidden_states=kept)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if input_ids is None or inputs_embeds is not None:
            if input_ids is not None or inputs_embeds is None:
                raise ConfigError("input_ids: got both or neither of input_ids and inputs_embeds, expected one of them")
            dim = self.config.d_model
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != dim or not inputs_embeds.is_floating_point():
                got = f"{inputs_embeds.dtype} of shape {tuple(inputs_embeds.shape)}"
                raise ConfigError(f"inputs_embeds: got {got}, expected floating (batch, seq, d_model={dim})")
            return inputs_embeds
        if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32):
            got = f"{input_ids.dtype} of shape {tuple(input_ids.shape)}"
            raise ConfigError(f"input_ids: got {got}, expected int64 or int32 (batch, seq)")
        if input_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            with suppress(RuntimeError):  # no values to read: the tensor is empty, or batched by vmap
                low, high = (int(bound) for bound in input_ids.aminmax())
                if low < 0 or high >= self.config.vocab_size:
                    raise ConfigError(f"input_ids: got {low} to {high}, expected 0 to {self.config.vocab_size - 1}")
        return self.model["embed_tokens"](input_ids)

    def _states(self, x: Tensor, context: Context) -> list[Tensor]:
        """Return x and then the output of every layer: (batch, seq, d_model) each."""
        states = [x]
        for layer in self.model["layers"]:  # type: ignore[attr-defined]
            states.append(layer(states[-1], context))
        return states

    def _context(
        self, x: Tensor, mask: Tensor | None, positions: Tensor | None, doc_ids: Tensor | None, cache: KVCache | None
    ) -> Context:
        config, n, dtype = self.config, x.shape[1], widen(x[:0]).dtype
        context, valid, past = Context(cache=cache), mask, 0
        if cache is not None:
            if cache.n_layers != config.n_layers:
                raise ConfigError(f"cache: got one of {cache.n_layers} layers, expected n_layers={config.n_layers}")
            if doc_ids is not None or not config.causal:
                raise ConfigError("cache: got doc_ids or a bidirectional model, expected one causal document per row")
            if mask is not None:
                cache.mark(mask)
            past = cache.length
            valid = cache.key_valid(past + n)
        slots = torch.arange(past + n, device=x.device)[None]
        if config.position == "rope":
            if positions is None:
                positions = slots if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
            context.rotary = rotary_tables(positions[:, -n:], config.head_dim, config.rope_base, dtype)
        if valid is not None or doc_ids is not None or config.position == "alibi":
            valid = torch.ones_like(slots, dtype=torch.bool) if valid is None else valid
            context.mask = visible(valid, n, causal=config.causal, doc_ids=doc_ids)
        if context.mask is not None and config.position == "alibi":
            bias = alibi_bias(config.n_heads, (slots[:, -n:, None] - slots[:, None]).to(dtype))
            context.mask = bias.masked_fill(~context.mask, -math.inf)
        return context


@torch.no_grad()
def initialize(module: nn.Module, config: TransformerConfig, seed: int) -> None:
    """Draw every parameter of a module from a stream of its own, named by the seed and the parameter's name.

    Equal names and shapes so get equal values in every model, on every device and in every sharding. Scales become 1,
    biases 0, and matrices normal with the standard deviation (or the one in brackets, if they write to the residual)
    mitchell: fan_in^-1/2 [(2 fan_in (layer + 1))^-1/2, layers counted from 0], cut off at three of them (OLMo), or
    normal: 0.02 [0.02 / sqrt(2 n_layers)] (GPT-2).
    """
    for name, parameter in module.named_parameters():
        value = torch.full(parameter.shape, float(name.endswith("weight")), dtype=torch.float32, device="cpu")
        if value.ndim > 1:
            stream, layer = generator(seed, name), re.search(r"layers\.(\d+)\.", name)
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            if config.init == "normal":
                value.normal_(0.0, 0.02 * (2 * config.n_layers if writes else 1) ** -0.5, generator=stream)
            else:
                std = (value.shape[1] * (2 * (int(layer[1]) + 1) if writes and layer else 1)) ** -0.5
                nn.init.trunc_normal_(value, 0.0, std, -3 * std, 3 * std, generator=stream)
        if hasattr(parameter, "device_mesh") and hasattr(parameter, "placements"):  # FSDP2: each rank keeps its part
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(value)
