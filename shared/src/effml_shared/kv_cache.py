"""The keys and values that decoding re-reads: one cache for every decoder of effml.

State: per layer one buffer (2, batch, kv_heads, capacity, head_dim), keys as attention uses them (after normalisation
and rotation), and one boolean (batch, capacity) if a batch was ever left-padded. Cost: 2 x layers x kv_heads x
head_dim x itemsize bytes per token; appending is amortised O(1) per token because capacity doubles, or fixed if
`max_len` is given. For inference only: buffers are written in place, so nothing may be differentiated through them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from effml_shared.errors import ConfigError


class KVCache:
    """Hold n_layers buffers, each made by the first `append` in the shape, type and device of its keys."""

    def __init__(self, n_layers: int, max_len: int | None = None) -> None:
        self.max_len = max_len
        self._buffers: list[Tensor | None] = [None] * n_layers
        self._lengths = [0] * n_layers
        self._valid: Tensor | None = None  # beyond the marked slots always True

    @property
    def n_layers(self) -> int:
        """The number of layers the cache serves."""
        return len(self._buffers)

    @property
    def length(self) -> int:
        """Tokens that every layer has stored: does not move while a forward pass is under way, until its last layer."""
        return min(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, unused capacity included."""
        return sum(buffer.nbytes for buffer in self._buffers if buffer is not None)

    def get(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return views of what a layer has stored: keys and values (batch, kv_heads, its length, head_dim)."""
        buffer = self._buffers[layer]
        if buffer is None:
            raise ConfigError(f"cache: got a read of layer {layer}, expected an append to it first")
        keys, values = buffer[..., : self._lengths[layer], :]
        return keys, values

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store new tokens of a layer, both (batch, kv_heads, new, head_dim), and return all it holds, as `get`.

        Raises:
            ConfigError: the shape is not that of what is stored, `max_len` is exceeded, or the keys require gradients.
        """
        if key.requires_grad or value.requires_grad:
            raise ConfigError("cache: got keys that require gradients, expected a call under torch.no_grad()")
        start, end = self._lengths[layer], self._lengths[layer] + key.shape[2]
        buffer = self._reserve(layer, key, end)
        buffer[0, :, :, start:end] = key
        buffer[1, :, :, start:end] = value
        self._lengths[layer] = end
        return self.get(layer)

    def _reserve(self, layer: int, key: Tensor, end: int) -> Tensor:
        if self.max_len is not None and end > self.max_len:
            raise ConfigError(f"cache: got {end} tokens, expected at most max_len={self.max_len}")
        buffer = self._buffers[layer]
        batch, kv_heads, _, head_dim = key.shape
        if buffer is None:
            buffer = key.new_empty(2, batch, kv_heads, self.max_len or max(end, 16), head_dim)
        elif (batch, kv_heads, head_dim) != (*buffer.shape[1:3], buffer.shape[4]):
            held = f"(batch, kv_heads, head_dim)={(*buffer.shape[1:3], buffer.shape[4])}"
            raise ConfigError(f"cache: got keys of {(batch, kv_heads, head_dim)}, expected {held} as already stored")
        elif end > buffer.shape[3]:
            grown = buffer.new_empty(*buffer.shape[:3], max(end, 2 * buffer.shape[3]), head_dim)
            grown[..., : self._lengths[layer], :] = buffer[..., : self._lengths[layer], :]
            buffer = grown
        self._buffers[layer] = buffer
        return buffer

    def mark(self, mask: Tensor) -> None:
        """Say which of the next tokens are real, bool (batch, new), before they are appended; unmarked ones are.

        Raises:
            ConfigError: a row ends in padding, after which its next token would be misplaced (seen on a CPU only).
        """
        if mask.device.type == "cpu" and not torch.compiler.is_compiling() and not mask[:, -1].all():
            raise ConfigError("attention_mask: got padding on the right, expected it on the left with a cache")
        before = self.key_valid(self.length)
        before = mask.new_ones(mask.shape[0], self.length) if before is None else before
        self._valid = torch.cat([before, mask], dim=1)

    def key_valid(self, n_keys: int) -> Tensor | None:
        """Return which of the first n_keys slots hold real tokens, a view (batch, n_keys); None: all of them."""
        if self._valid is not None and self._valid.shape[1] < n_keys:
            padding = self._valid.new_ones(self._valid.shape[0], max(n_keys, 2 * self._valid.shape[1]))
            padding[:, : self._valid.shape[1]] = self._valid
            self._valid = padding
        return None if self._valid is None else self._valid[:, :n_keys]

    def crop(self, length: int) -> None:
        """Forget every token from `length` on, as if it had never been appended.

        Raises:
            ConfigError: fewer tokens are stored.
        """
        if not 0 <= length <= self.length:
            raise ConfigError(f"length: got {length}, expected 0 to the {self.length} tokens stored")
        self._lengths = [length] * self.n_layers
        if self._valid is not None:
            self._valid[:, length:] = True

    def select(self, rows: Tensor) -> None:
        """Make row i what row `rows[i]` was, rows (new_batch,): reorders beams, drops finished rows, copies prompts."""
        self._buffers = [
            None if buffer is None else _rows_of(buffer, rows, length)
            for buffer, length in zip(self._buffers, self._lengths, strict=True)
        ]
        if self._valid is not None:
            self._valid = self._valid.index_select(0, rows)

    def fork(self, rows: Tensor) -> KVCache:
        """Return another cache that holds these rows, and leave this one as it is."""
        other = copy.copy(self)
        for name, value in vars(self).items():  # lists are written in place; tensors that `select` makes are new
            setattr(other, name, list(value) if isinstance(value, list) else value)
        other.select(rows)
        return other

    def reset(self) -> None:
        """Forget everything and keep the memory for the next batch of the same shape."""
        self._lengths = [0] * self.n_layers
        self._valid = None


def _rows_of(buffer: Tensor, rows: Tensor, length: int) -> Tensor:
    """Return rows of a buffer (2, batch, kv_heads, capacity, head_dim) with its capacity, copying what it holds."""
    chosen = buffer.new_empty(2, len(rows), *buffer.shape[2:])
    chosen[..., :length, :] = buffer[..., :length, :].index_select(1, rows)
    return chosen
