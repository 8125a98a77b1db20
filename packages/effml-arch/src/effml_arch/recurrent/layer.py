"""The Recurrent Transformer layer: later positions attend to keys and values made from this layer's own outputs.

A position reads the persistent pairs of earlier positions, projected from their outputs, and its own temporary pair,
projected from its input; norm and projections are the same for both, so the parameters are those of the shared `Block`
and a Transformer's weights load unchanged. The first position, and any sequence of one, is a standard layer exactly.

Cost per token: the 2 kv_dim d_model multiply-adds of keys and values once more than a standard layer; training and
prefill take one sequential step per position and layer. A decoding step has the cache of a standard layer: the
persistent pairs, and nothing else. Several tokens at once on a cache (chunked prefill, verification of drafts) cost
one sequential step each. Outer activation checkpointing is exact but runs the sequential pass twice: avoid it.

Dropout, in training: two independent masks of the input's shape, on what attention and on what the MLP adds, drawn for
all positions before the first, by one call per layer of PyTorch's global generator, whatever the backend. Both
operators of the sequential passes stay whole under `torch.compile(fullgraph=True)`, with masks, documents and caches;
the naive backend is unrolled. As a function of its weights, the layer is `torch.func.functional_call(layer, weights,
x)`; transforms of `torch.func` and second derivatives need the naive backend.

Source: the Recurrent Transformer, arXiv 2604.21215, section 2, pre-norm. Rotary positions, grouped queries, masks,
windows and decoding are not in the paper's code and exact here. The paper writes the residual with 1 / sqrt(layers),
`residual_scale="depth"`; its released settings scale the initial draw instead, `init="mitchell"`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError
from effml_shared.kv_cache import KVCache
from effml_shared.layers import Block, Context, TransformerConfig, rotary_tables
from effml_shared.tensors import widen
from torch import Tensor

from effml_arch.recurrent.decoding import decode
from effml_arch.recurrent.form import form_of, weights_of
from effml_arch.recurrent.naive import naive_scan, residual
from effml_arch.recurrent.operators import Operands, check_transforms, solution, solve
from effml_arch.recurrent.pair_bias import PairBias
from effml_arch.recurrent.schedule import SCHEDULES
from effml_arch.window_cache import WindowCache

__all__ = ["RecurrentContext", "RecurrentTransformerConfig", "RecurrentTransformerLayer", "recurrent_context"]


@dataclass(frozen=True, kw_only=True)
class RecurrentTransformerConfig(TransformerConfig):
    """Shape and variant of a `RecurrentTransformer`.

    >>> RecurrentTransformerConfig(norm_position="post")
    Traceback (most recent call last):
    effml_shared.errors.ConfigError: norm_position: got 'post', expected 'pre': after it, the two pairs would disagree
    """

    recurrent_layers: tuple[int, ...] | str = "all"  # all, or which ones, counted from 0; the others are standard
    window: int | None = None  # persistent pairs at least this many tokens back are hidden from recurrent layers
    write_mix: float = 1.0  # persistent pairs are made from (1 - this) input + this output; 0: a standard layer
    backend: str = "tiled"  # tiled | naive: the reference, which differentiates any replaced part
    base_block: int = 32  # positions between two tiles
    schedule: str = "auto"  # tile | pull (see `effml_arch.recurrent.schedule`) | auto: pull on a CPU, else tile
    cuda_graphs: bool = False  # on a GPU, shapes that repeat are replayed, see `effml_arch.recurrent.graphs`
    wavefront: str = "auto"  # of layers, without gradients: on | off | auto, see `effml_arch.recurrent.wavefront`

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_position != "pre":
            raise ConfigError("norm_position: got 'post', expected 'pre': after it, the two pairs would disagree")
        if not self.causal:
            raise ConfigError("causal: got False, expected True: a recurrence has a direction")
        check_choice("backend", self.backend, ("tiled", "naive"))
        check_choice("schedule", self.schedule, ("auto", *SCHEDULES))
        check_choice("wavefront", self.wavefront, ("auto", "on", "off"))
        check_count("base_block", self.base_block, 1)
        if not 0 <= self.write_mix <= 1:
            raise ConfigError(f"write_mix: got {self.write_mix}, expected a number in [0, 1]")
        if self.window is not None:
            check_count("window", self.window, 1)
        if self.recurrent_layers != "all":
            if isinstance(self.recurrent_layers, str):
                raise ConfigError(f"recurrent_layers: got {self.recurrent_layers!r}, expected 'all' or layer numbers")
            object.__setattr__(self, "recurrent_layers", tuple(self.recurrent_layers))
            for layer in self.recurrent_layers:
                check_range("recurrent_layers", layer, 0, self.n_layers)

    def is_recurrent(self, layer: int) -> bool:
        """Return whether a layer, counted from 0, is recurrent."""
        return self.recurrent_layers == "all" or layer in self.recurrent_layers


@dataclass
class RecurrentContext(Context):
    """What the layers of one forward pass share; `mask`, if any, is for standard layers between recurrent ones."""

    bias: PairBias = field(default_factory=PairBias)
    past: int = 0  # tokens in the cache


def recurrent_context(
    config: RecurrentTransformerConfig,
    x: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    doc_ids: Tensor | None = None,
    cache: KVCache | None = None,
) -> RecurrentContext:
    """Return the context of one forward pass over x (batch, seq, d_model); the other arguments as for the layer."""
    valid, past, slots = None if attention_mask is None else attention_mask.bool(), 0, x.shape[1]
    if cache is not None:
        if isinstance(cache, WindowCache):
            raise ConfigError("cache: got a WindowCache, expected a KVCache: a recurrent layer numbers all keys it had")
        if cache.n_layers != config.n_layers:
            raise ConfigError(f"cache: got one of {cache.n_layers} layers, expected n_layers={config.n_layers}")
        if doc_ids is not None:
            raise ConfigError("cache: got doc_ids, expected one document per row")
        if valid is not None:
            cache.mark(valid)
        past = cache.length
        slots += past
        valid = cache.key_valid(slots)
    heads = config.n_heads if config.position == "alibi" else None
    bias = PairBias(heads, valid, doc_ids, config.window)
    context = RecurrentContext(cache=cache, bias=bias, past=past)
    if config.position == "rope":
        if position_ids is None:
            counted = torch.arange(slots, device=x.device)[None]
            position_ids = counted if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
        positions = position_ids[:, -x.shape[1] :]
        context.rotary = rotary_tables(positions, config.head_dim, config.rope_base, widen(x[:0]).dtype)
    return context


class RecurrentTransformerLayer(Block):
    """One recurrent layer on the residual stream, in place of a shared `Block` and with its parameters.

    `write_mix`, `backend`, `base_block`, `schedule` and `cuda_graphs` are read at every call and may be set on it.
    The tiled backend reads weights past the forward passes of the layer's parts. Where these are to be replaced, as by
    a precision scheme of `effml_quant` (which asks `precision_refusal` first), set `backend="naive"`.

    Args:
        config: what this layer and its siblings share.
        layer: its number, from 0: where it writes in a cache.
    """

    def __init__(self, config: RecurrentTransformerConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.config = config
        self.write_mix, self.backend = config.write_mix, config.backend
        self.base_block, self.schedule, self.cuda_graphs = config.base_block, config.schedule, config.cuda_graphs

    def forward(
        self,
        x: Tensor,
        context: Context | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        doc_ids: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the layer's output (batch, seq, d_model) for x of that shape.

        Args:
            x: at least one position.
            context: of `recurrent_context`, in place of all that follow.
            attention_mask: (batch, seq), zero at padding, whose pairs no later position reads.
            position_ids: (batch or 1, seq), for RoPE; by default real tokens are counted from 0.
            doc_ids: (batch, seq); tokens of different documents do not see each other.
            cache: holds the tokens before these and takes these in; under `torch.no_grad` only.

        Raises:
            ConfigError: shapes disagree, gradients are asked for with a cache, or a part of the layer was replaced by
                one that the tiled backend does not know.
        """
        if x.ndim != 3 or x.shape[1] == 0 or x.shape[2] != self.config.d_model or not x.is_floating_point():
            expected = f"floating (batch, at least 1, d_model={self.config.d_model})"
            raise ConfigError(f"x: got {x.dtype} of shape {tuple(x.shape)}, expected {expected}")
        if context is None:
            batch, seq, _ = x.shape
            given = {"attention_mask": attention_mask, "position_ids": position_ids, "doc_ids": doc_ids}
            for name, tensor in given.items():
                shapes = [(batch, seq), *[(1, seq)] * (name == "position_ids")]
                if tensor is not None and tuple(tensor.shape) not in shapes:
                    expected = " or ".join(map(str, shapes))
                    raise ConfigError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected}")
            context = recurrent_context(self.config, x, **given, cache=cache)
        if not isinstance(context, RecurrentContext):
            raise ConfigError(f"context: got {type(context).__name__}, expected one of recurrent_context")
        kept = self._draw_kept(x)
        cache, past = context.cache, None
        decodes = cache is not None and x.shape[1] == 1 and self.backend == "tiled" and not torch.is_grad_enabled()
        if decodes and not torch.compiler.is_compiling():  # a graph of it would be for one length of the cache only
            return decode(self, x, context, kept)
        if cache is not None and context.past:
            past = cache.get(self.self_attn.layer)
        if self.backend == "naive" or not len(x):  # nothing to tile in an empty batch
            z, k, v = naive_scan(
                self, x, context.bias, rotary=context.rotary, past=past, write_mix=self.write_mix, kept=kept
            )
        else:
            z, k, v = self._tiled(x, context, past, kept)
        if cache is not None:
            if z.requires_grad:
                raise ConfigError("cache: got a pass with gradients, expected a call under torch.no_grad()")
            cache.append(self.self_attn.layer, k, v)
        return z

    @property
    def precision_refusal(self) -> str | None:
        """Why no precision scheme may be put on this layer's parts, in one line that says what to do; None: it may."""
        if self.backend == "naive":
            return None
        return "backend: got 'tiled', which passes over what a precision scheme covers, expected backend=\"naive\""

    def _draw_kept(self, x: Tensor) -> Tensor | None:
        """Draw which numbers dropout keeps of what attention, and the MLP, will add: (2, batch, seq, d_model) bool."""
        drop = self.dropout
        if not drop.training or drop.p == 0:
            return None
        return torch.empty(2, *x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - drop.p)

    def _tiled(
        self, x: Tensor, context: RecurrentContext, past: tuple[Tensor, Tensor] | None, kept: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_transforms((x, *self.parameters()))
        attn, bias = self.self_attn, context.bias
        h = self.input_layernorm(x)
        q, (own_k, own_v) = attn.query(h, context), attn.key_value(h, context)
        form = form_of(
            self,
            dropout=0.0 if kept is None else self.dropout.p,
            alibi=bias.alibi_heads is not None,
            window=bias.window,
            write_mix=self.write_mix,
            base_block=self.base_block,
            schedule=("pull" if x.device.type == "cpu" else "tile") if self.schedule == "auto" else self.schedule,
            cuda_graphs=self.cuda_graphs,
        )
        weights, (cos, sin) = weights_of(self, form), context.rotary or (None, None)
        hidden = (bias.key_valid, bias.doc_ids)
        operands = Operands(x.detach(), q, own_k, own_v, weights, *hidden, cos, sin, kept, form.spec, context.past)
        wanted = any(tensor.requires_grad for tensor in (x, *self.parameters()))
        differentiable = torch.is_grad_enabled() and wanted
        result = solve(operands, past, with_lse=differentiable)
        k, v = (t.unflatten(0, own_k.shape[:2]).to(own_k.dtype) for t in (result.keys, result.values))
        if not differentiable:
            return result.z.transpose(0, 1).to(x.dtype).contiguous(), k, v
        # The layer at its solution, all positions at once: what autograd sees.
        u = residual(self, x, attn.o_proj(result.heads.transpose(0, 1).to(x.dtype)), kept, 0)
        z = residual(self, u, self.mlp(self.post_attention_layernorm(u)), kept, 1)
        source = result.z.transpose(0, 1).to(x.dtype)
        source = source if self.write_mix == 1 else torch.lerp(x, source, self.write_mix)
        new = attn.key_value(self.input_layernorm(source), context)
        return solution(z, *new, operands, result), k, v
