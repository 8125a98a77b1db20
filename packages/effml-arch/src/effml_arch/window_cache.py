"""A key-value cache for sliding-window attention: memory that follows the window, not the text.

A token sees itself and the window - 1 tokens before it. State: per layer one buffer of the last `window - 1 + rollback`
tokens and as many free slots (at least 16). New tokens fill the free slots; when there are too few, the kept tokens
move to the front. So what a query sees is always one contiguous view in the order of positions, which a ring would have
to unroll, at the price of twice the ring's memory; moving costs one copied token per appended one. The one boolean per
token that marks left padding does grow, as in `KVCache`.
"""

from __future__ import annotations

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.kv_cache import KVCache
from torch import Tensor

__all__ = ["WindowCache"]


class WindowCache(KVCache):
    """A `KVCache` that forgets what no later token can see; every layer of its model must have such a window.

    Args:
        n_layers: layers it serves.
        window: tokens that a query sees, itself included.
        rollback: tokens that `crop` can take back at any time, as after rejected drafts.
    """

    def __init__(self, n_layers: int, window: int, *, rollback: int = 0) -> None:
        check_count("window", window, 1)
        check_count("rollback", rollback, 0)
        self.window, self._kept = window, window - 1 + rollback
        self._capacity = self._kept + max(self._kept, 16)
        super().__init__(n_layers, self._capacity)
        self._dropped = [0] * n_layers

    @property
    def length(self) -> int:
        """Tokens that every layer has seen, forgotten ones included."""
        return min(stored + dropped for stored, dropped in zip(self._lengths, self._dropped, strict=True))

    def get(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return views of what the next token will see besides itself: both (batch, kv_heads, < window, head_dim)."""
        return self._last(layer, self.window - 1)

    def _last(self, layer: int, count: int) -> tuple[Tensor, Tensor]:
        keys, values = super().get(layer)
        start = max(0, keys.shape[2] - count)
        return keys[:, :, start:], values[:, :, start:]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens, both (batch, kv_heads, new, head_dim); return what `get` would have, and them behind it.

        These are the keys that the first new token sees together with those of all later ones: an old key must not be
        overwritten by the last token of a chunk before the first has read it.

        Raises:
            ConfigError: the shape is not that of what is stored, or the keys require gradients.
        """
        new = key.shape[2]
        super().append(layer, key[:, :, :0], value[:, :, :0])  # checks them, and makes the buffer
        if new > self._capacity - self._kept:
            old = self._last(layer, self._kept)
            both = [torch.cat([past, x.to(past.dtype)], dim=2) for past, x in zip(old, (key, value), strict=True)]
            total, start = both[0].shape[2], max(0, both[0].shape[2] - self._kept)
            self._dropped[layer] += self._lengths[layer] + new - (total - start)
            self._lengths[layer] = 0
            super().append(layer, both[0][:, :, start:], both[1][:, :, start:])
            first = max(0, total - new - (self.window - 1))
            return both[0][:, :, first:], both[1][:, :, first:]
        if self._lengths[layer] + new > self._capacity:
            self._slide(layer)
        super().append(layer, key, value)
        return self._last(layer, self.window - 1 + new)

    def _slide(self, layer: int) -> None:
        """Move the kept tokens to the front of the buffer."""
        for stored in super().get(layer):
            stored[:, :, : self._kept] = stored[:, :, stored.shape[2] - self._kept :].clone()  # the two may overlap
        self._dropped[layer] += self._lengths[layer] - self._kept
        self._lengths[layer] = self._kept

    def crop(self, length: int) -> None:
        """Forget every token from `length` on, as if it had never been appended.

        Raises:
            ConfigError: there are fewer tokens, or what the token at `length` must see is forgotten: see `rollback`.
        """
        first = max(dropped + self.window - 1 if dropped else 0 for dropped in self._dropped)
        if not first <= length <= self.length:
            held = f"{first} to the {self.length} tokens seen, rollback={self._kept - self.window + 1}"
            raise ConfigError(f"length: got {length}, expected {held}")
        self._lengths = [length - dropped for dropped in self._dropped]
        if self._valid is not None:
            self._valid[:, length:] = True

    def reset(self) -> None:
        """Forget everything and keep the memory for the next batch of the same shape."""
        super().reset()
        self._dropped = [0] * self.n_layers
