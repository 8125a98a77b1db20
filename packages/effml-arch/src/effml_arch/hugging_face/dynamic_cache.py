"""A `DynamicCache` of Hugging Face's transformers in the role of our `KVCache`, for one forward pass.

The keys and values stay theirs: `generate` reorders, repeats and crops them between two passes. A recurrent layer
stores in it what a standard one does, keys after normalisation and rotation (batch, kv_heads, seq, head_dim), so it
needs no cache of its own. Each `update` copies the whole layer (torch.cat): O(length) bytes per token and layer, where
our own cache is O(1). Caches that store anything but what they are given cannot be read and are refused.
"""

from __future__ import annotations

from typing import Any

from effml_shared.errors import ConfigError
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

__all__ = ["BorrowedCache"]


class BorrowedCache:
    """What layers use of a `KVCache`, on a cache of transformers.

    Args:
        cache: empty, or what `n_layers` layers stored in it.
        n_layers: the number of layers it serves.
        valid: (batch, length + new) bool, which tokens are real, those of this pass included; None: all of them.
    """

    def __init__(self, cache: Any, n_layers: int, valid: Tensor | None = None) -> None:
        layers = cache.layers if isinstance(cache, DynamicCache) and not cache.offloading else [None]
        if any(type(layer) is not DynamicLayer for layer in layers):
            kinds = sorted({type(layer).__name__ for layer in layers if layer is not None})
            got = f"a {type(cache).__name__}" + f" of {', '.join(kinds)}" * bool(kinds)
            raise ConfigError(
                f"past_key_values: got {got}, expected a plain DynamicCache, as generate makes without "
                "cache_implementation or with 'dynamic'"
            )
        self.length = int(cache.get_seq_length())  # of before this pass, whichever layers have stored since
        if self.length and len(layers) != n_layers:
            raise ConfigError(f"past_key_values: got {len(layers)} layers, expected num_hidden_layers={n_layers}")
        self.cache, self.n_layers, self._valid = cache, n_layers, valid

    def key_valid(self, n_keys: int) -> Tensor | None:
        """Return which of the first n_keys tokens are real (batch, n_keys); None: all of them."""
        return None if self._valid is None else self._valid[:, :n_keys]

    def get(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return what a layer has stored: keys and values (batch, kv_heads, its length, head_dim)."""
        stored = self.cache.layers[layer]
        return stored.keys, stored.values

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens of a layer, and return all it holds, as `get`: not copies, so a layer may write to them."""
        keys, values = self.cache.update(key, value, layer)
        return keys, values
