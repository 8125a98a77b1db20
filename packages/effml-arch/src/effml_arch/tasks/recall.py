"""Associative recall: read keys and values in turn, and name the value of a key that has occurred before.

Every sequence has a random map of its own from keys to values, so the answer is nowhere but in the text. Keys are drawn
with replacement; the value is asked for where its key ends (and, of a longer one, within the value), from the key's
second occurrence on. Noise tokens in place of pairs, and keys and values of several tokens, give the noisy and the
fuzzy variants of arXiv 2403.17844, there with noise between pairs and with lengths that vary; here lengths are fixed,
so that a sequence is a row of slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError

from effml_arch.tasks.task import IGNORE_INDEX, Bits, Ids, Task, below

__all__ = ["Recall"]


@dataclass(frozen=True)
class Recall(Task):
    """Ids are key tokens, then value tokens, then noise tokens.

    Of the key_tokens^key_len possible keys, n_keys occur in a sequence (for one-token keys by default: all). The value
    of each is drawn uniformly, so two keys may share one.
    """

    name: ClassVar[str] = "recall"

    length: int = 32  # tokens, a multiple of key_len + value_len
    key_tokens: int = 8
    value_tokens: int = 8
    n_keys: int = 8  # different keys of a sequence
    key_len: int = 1  # tokens of a key
    value_len: int = 1  # tokens of a value
    noise: float = 0.0  # probability that a slot holds noise instead of a pair
    noise_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "key_tokens", "value_tokens", "n_keys", "key_len", "value_len"):
            check_count(name, getattr(self, name), 1)
        check_count("noise_tokens", self.noise_tokens, 0)
        check_range("noise", self.noise, 0.0, 1.0)
        if self.length % self._slot:
            raise ConfigError(f"length: got {self.length}, expected a multiple of {self._slot}, a key and its value")
        if not self.n_keys <= self.key_tokens**self.key_len <= 1 << 16:
            possible = f"{self.key_tokens}^{self.key_len} possible keys"
            raise ConfigError(
                f"n_keys: got {self.n_keys} of {possible}, expected no more than these, and those <= 2^16"
            )
        if (self.noise > 0) != (self.noise_tokens > 0):
            raise ConfigError(
                f"noise_tokens: got {self.noise_tokens} with noise={self.noise}, expected both or neither"
            )

    @property
    def vocab_size(self) -> int:
        return self.key_tokens + self.value_tokens + self.noise_tokens

    @property
    def _slot(self) -> int:
        return self.key_len + self.value_len

    @property
    def _sizes(self) -> tuple[int, ...]:
        """Draws for: the choice of keys, their values, the key of each slot, which slots are noise, the noise."""
        slots = self.length // self._slot
        noise = (slots, self.length) if self.noise else (0, 0)
        return (self.key_tokens**self.key_len, self.n_keys * self.value_len, slots, *noise)

    @property
    def draws(self) -> int:
        return sum(self._sizes)

    def encode(self, bits: Bits) -> tuple[Ids, Ids]:
        choice, content, which, noisy, noise = np.split(bits, np.cumsum(self._sizes)[:-1], axis=1)
        keys = np.argsort(choice, axis=1, kind="stable")[:, : self.n_keys]  # (rows, n_keys): all possible, numbered
        values = self.key_tokens + below(content, self.value_tokens).reshape(-1, self.n_keys, self.value_len)

        chosen = below(which, self.n_keys)  # (rows, slots)
        places = self.key_tokens ** np.arange(self.key_len)[::-1]
        key = np.take_along_axis(keys, chosen, 1)[..., None] // places % self.key_tokens
        value = np.take_along_axis(values, chosen[..., None], 1)
        slots = np.concatenate([key, value], axis=2)  # (rows, slots, key_len + value_len)

        pair = np.ones(chosen.shape, bool)
        if self.noise:
            pair = noisy >= np.uint64(min(self.noise * 2.0**64, 2.0**64 - 2048))
            first = self.key_tokens + self.value_tokens
            noise_ids = first + below(noise, self.noise_tokens).reshape(slots.shape)
            slots = np.where(pair[..., None], slots, noise_ids)

        occurs = (chosen[..., None] == np.arange(self.n_keys)) & pair[..., None]
        before = np.cumsum(occurs, axis=1) - occurs
        repeated = pair & (np.take_along_axis(before, chosen[..., None], 2)[..., 0] > 0)
        targets = np.full(slots.shape, IGNORE_INDEX, np.int64)
        targets[:, :, self.key_len - 1 : -1] = np.where(repeated[..., None], value, IGNORE_INDEX)
        return slots.reshape(-1, self.length), targets.reshape(-1, self.length)
