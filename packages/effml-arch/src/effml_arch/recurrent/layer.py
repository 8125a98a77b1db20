"""The Recurrent Transformer layer: later positions attend to keys and values made from this layer's own outputs.

A position reads the persistent pairs of earlier positions, projected from their outputs, and its own temporary pair,
projected from its input; norm and projections are the same for both, so the parameters are those of the shared `Block`
and a Transformer's weights load unchanged. The first position, and any sequence of one, is a standard layer exactly.

Cost per token: the 2 kv_dim d_model multiply-adds of keys and values once more than a standard layer; training and
prefill take one sequential step per position and layer. A decoding step has the cache of a standard layer: the
persistent pairs, and nothing else. Several tokens at once on a cache (chunked prefill, verification of drafts) cost
one sequential step each. Outer activation checkpointing would run the sequential pass twice: avoid it.

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

from effml_arch.recurrent.attention_state import Geometry, group_queries
from effml_arch.recurrent.folding import FoldedBlock, layer_tensors
from effml_arch.recurrent.naive import naive_scan
from effml_arch.recurrent.pair_bias import PairBias
from effml_arch.recurrent.schedule import SCHEDULES, schedule
from effml_arch.recurrent.tiled import Queries, Scan, scan
from effml_arch.recurrent.tiled_backward import Recurrence, Solved
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_position != "pre":
            raise ConfigError("norm_position: got 'post', expected 'pre': after it, the two pairs would disagree")
        if not self.causal:
            raise ConfigError("causal: got False, expected True: a recurrence has a direction")
        check_choice("backend", self.backend, ("tiled", "naive"))
        check_choice("schedule", self.schedule, ("auto", *SCHEDULES))
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
    context = RecurrentContext(cache=cache, past=past)
    heads = config.n_heads if config.position == "alibi" else None
    context.bias = PairBias(heads, valid, doc_ids, config.window)
    if config.position == "rope":
        if position_ids is None:
            counted = torch.arange(slots, device=x.device)[None]
            position_ids = counted if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
        positions = position_ids[:, -x.shape[1] :]
        context.rotary = rotary_tables(positions, config.head_dim, config.rope_base, widen(x[:0]).dtype)
    return context


class RecurrentTransformerLayer(Block):
    """One recurrent layer on the residual stream, in place of a shared `Block` and with its parameters.

    `write_mix`, `backend`, `base_block` and `schedule` are read at every call and may be set on the layer.

    Args:
        config: what this layer and its siblings share.
        layer: its number, from 0: where it writes in a cache.
    """

    def __init__(self, config: RecurrentTransformerConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.config = config
        self.write_mix, self.backend = config.write_mix, config.backend
        self.base_block, self.schedule = config.base_block, config.schedule

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
        cache, past = context.cache, None
        if cache is not None and context.past:
            past = cache.get(self.self_attn.layer)
        if self.backend == "naive" or not len(x):  # nothing to tile in an empty batch
            z, k, v = naive_scan(self, x, context.bias, rotary=context.rotary, past=past, write_mix=self.write_mix)
        else:
            z, k, v = self._tiled(x, context, past)
        if cache is not None:
            if z.requires_grad:
                raise ConfigError("cache: got a pass with gradients, expected a call under torch.no_grad()")
            cache.append(self.self_attn.layer, k, v)
        return z

    @torch.compiler.disable
    def _tiled(
        self, x: Tensor, context: RecurrentContext, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        attn, dtype = self.self_attn, widen(x[:0]).dtype
        wanted = any(tensor.requires_grad for tensor in (x, *self.parameters()))
        differentiable = torch.is_grad_enabled() and wanted
        h = self.input_layernorm(x)
        q, (own_k, own_v) = attn.query(h, context), attn.key_value(h, context)
        (batch, kv_heads, n, dim), tensors = own_k.shape, layer_tensors(self)
        geometry = Geometry(batch, q.shape[1] // kv_heads, context.past)
        kind = ("pull" if x.device.type == "cpu" else "tile") if self.schedule == "auto" else self.schedule
        tiles = schedule(kind, n, self.base_block)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            rows = x.to(dtype).transpose(0, 1).contiguous()
            own = [t.to(dtype).flatten(0, 1).contiguous() for t in (own_k, own_v)]
            solution = scan(
                FoldedBlock(self, tensors, dtype),
                rows,
                Queries(group_queries(q.to(dtype), kv_heads) * dim**-0.5, *own),
                context.bias,
                geometry,
                rotary=context.rotary,
                past=None if past is None else (past[0].to(dtype).flatten(0, 1), past[1].to(dtype).flatten(0, 1)),
                write_mix=self.write_mix,
                base_block=min(self.base_block, n),
                tiles=tiles,
                with_lse=differentiable,
            )
        k, v = (t.unflatten(0, (batch, kv_heads)).to(own_k.dtype) for t in (solution.keys, solution.values))
        if not differentiable:
            return solution.z.transpose(0, 1).to(x.dtype).contiguous(), k, v
        solved = Solved(
            self, solution, context.bias, geometry, context.rotary, self.write_mix, self.base_block, tiles, [*tensors]
        )
        return self._differentiable(x, q, own_k, own_v, rows, solved, context, list(tensors.values())), k, v

    def _differentiable(
        self,
        x: Tensor,
        q: Tensor,
        own_k: Tensor,
        own_v: Tensor,
        rows: Tensor,
        solved: Solved,
        context: RecurrentContext,
        weights: list[Tensor],
    ) -> Tensor:
        """Evaluate the layer at its solution, all positions at once, and hand the pieces to `Recurrence`."""
        scan: Scan = solved.scan
        u = x + self.scale * self.self_attn.o_proj(scan.heads.transpose(0, 1).to(x.dtype))
        z = u + self.scale * self.mlp(self.post_attention_layernorm(u))
        source = scan.z.transpose(0, 1).to(x.dtype)
        source = source if self.write_mix == 1 else torch.lerp(x, source, self.write_mix)
        k, v = self.self_attn.key_value(self.input_layernorm(source), context)
        return Recurrence.apply(z, q, own_k, own_v, k, v, rows, solved, weights)
