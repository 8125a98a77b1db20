"""One more token on a cache: a recurrent layer without tiles, in the operations of a standard layer's decoding step.

The token's own pair, made from the layer's input, lies in the cache while the token attends; then the persistent pair,
made from its output, takes its place. So no key is copied. Cost: a standard layer's decoding step and a second
projection of keys and values, 2 kv_dim d_model multiply-adds per sequence; memory O(1) beside the cache.
Source: the Recurrent Transformer, arXiv 2604.21215, section 2; decoding is not in the paper's code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from effml_shared.kv_cache import KVCache
from effml_shared.tensors import widen
from torch import Tensor

from effml_arch.recurrent.naive import residual

if TYPE_CHECKING:
    from effml_arch.recurrent.layer import RecurrentContext, RecurrentTransformerLayer

__all__ = ["decode"]


def decode(
    layer: RecurrentTransformerLayer, x: Tensor, context: RecurrentContext, kept: Tensor | None = None
) -> Tensor:
    """Return the layer's output for one token, x and result (batch, 1, d_model), and store its pair in the cache.

    To be called without gradients. kept: as in `naive_scan`.
    """
    attn, cache, slot = layer.self_attn, cast(KVCache, context.cache), context.past
    h = layer.input_layernorm(x)
    keys, values = cache.append(attn.layer, *attn.key_value(h, context))
    oldest = context.bias.oldest(slot)
    row = context.bias.tile(range(slot, slot + 1), range(oldest, slot), widen(x[:0])) if slot else None
    mask = None if row is None else F.pad(row, (0, 1))  # its own pair comes last, and is neither biased nor hidden
    attended = attn.attend(attn.query(h, context), keys[:, :, oldest:], values[:, :, oldest:], mask)
    u = residual(layer, x, attended, kept, 0)
    z = residual(layer, u, layer.mlp(layer.post_attention_layernorm(u)), kept, 1)
    source = z if layer.write_mix == 1 else torch.lerp(x, z, layer.write_mix)
    k, v = attn.key_value(layer.input_layernorm(source), context)
    keys[:, :, -1:], values[:, :, -1:] = k, v
    return z
