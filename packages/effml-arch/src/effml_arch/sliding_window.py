"""The Transformer with sliding-window attention: a token sees itself and the window - 1 tokens before it.

Parameters, names and initial values are those of the `Transformer`; only the mask differs, so weights carry over both
ways. Decoding needs a bounded cache, see `WindowCache`. Over a whole sequence the mask is dense: time and memory are
those of full attention, which makes this the reference for windowed layers rather than a fast one. Information still
travels L (window - 1) tokens through L layers. Source: local attention as in arXiv 2004.05150, section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.layers import Attention, Block, Context, TransformerConfig
from effml_shared.transformer import Transformer
from torch import Tensor

from effml_arch.window_cache import WindowCache

__all__ = ["SlidingWindowConfig", "SlidingWindowTransformer", "restrict_to_window"]


@dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig(TransformerConfig):
    """A `TransformerConfig` of a causal model with a window."""

    window: int = 128  # tokens that a query sees, itself included

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, 1)
        if not self.causal:
            raise ConfigError("causal: got a bidirectional model, expected a causal one with a window")


class _WindowAttention(Attention):
    """Attention over the keys of a window."""

    def __init__(self, config: SlidingWindowConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.window = config.window

    def forward(self, x: Tensor, context: Context) -> Tensor:
        k, v = self.key_value(x, context)
        if context.cache is not None:
            if isinstance(context.cache, WindowCache) and context.cache.window < self.window:
                raise ConfigError(f"cache: got a window of {context.cache.window}, expected at least {self.window}")
            k, v = context.cache.append(self.layer, k, v)
        q = self.query(x, context)
        mask = restrict_to_window(context.mask, q.shape[2], k.shape[2], self.window, device=x.device)
        return self.attend(q, k, v, mask)


class _WindowBlock(Block):
    def __init__(self, config: SlidingWindowConfig, layer: int = 0) -> None:
        super().__init__(config, layer)
        self.self_attn = _WindowAttention(config, layer)


class SlidingWindowTransformer(Transformer):
    """A `Transformer` whose layers see a window; takes a `SlidingWindowConfig`."""

    block = _WindowBlock
    config: SlidingWindowConfig

    def __init__(self, config: SlidingWindowConfig, seed: int = 0) -> None:
        if not isinstance(config, SlidingWindowConfig):
            raise ConfigError(f"config: got a {type(config).__name__}, expected a SlidingWindowConfig")
        super().__init__(config, seed)

    def new_cache(self, max_len: int | None = None, *, rollback: int = 0) -> WindowCache:
        """Return an empty cache for this model: of the size of the window, however long the text."""
        return WindowCache(self.config.n_layers, self.config.window, rollback=rollback)


def restrict_to_window(
    mask: Tensor | None, n_query: int, n_key: int, window: int, *, device: torch.device | None = None
) -> Tensor | None:
    """Return the mask of the last n_query tokens over the last n_key keys, with nothing visible beyond the window.

    mask: bool or bias (..., n_query, n_key or more), whose last column is the last key; None: causal attention. Returns
    None where the window hides nothing of that. The result has the mask's type, (..., n_query, n_key).
    """
    if mask is not None:
        mask = mask[..., mask.shape[-1] - n_key :]
    if n_key <= window:
        return mask
    query = torch.arange(n_key - n_query, n_key, device=device)[:, None]
    distance = query - torch.arange(n_key, device=device)
    inside = (distance >= 0) & (distance < window)
    if mask is None:
        return inside[None, None]
    return mask & inside if mask.dtype == torch.bool else mask.masked_fill(~inside, -math.inf)
