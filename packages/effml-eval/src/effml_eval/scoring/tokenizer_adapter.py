"""One face for the tokenizers that models come with: those of `effml_shared.data` and of Hugging Face's transformers.

What a tokenizer adds around a text by default is measured once, on a probe. What stands before it (a
beginning-of-sequence token, where it adds one) opens every context; what stands behind it, an end-of-sequence token,
never belongs into a text that goes on and is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from effml_shared.errors import ConfigError

__all__ = ["TokenizerAdapter"]

_PROBE = "a"
_CACHED = 1 << 12  # texts: a context is encoded once for all its choices


class TokenizerAdapter:
    """Encode and decode by a tokenizer of either kind.

    Raises:
        ConfigError: it is of neither kind, or cannot be asked for a text without special tokens.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.hugging_face = hasattr(tokenizer, "convert_ids_to_tokens")
        if not self.hugging_face and not all(hasattr(tokenizer, name) for name in ("encode", "decode", "eos_id")):
            expected = "one of effml_shared.data or of transformers"
            raise ConfigError(f"tokenizer: got a {type(tokenizer).__name__}, expected {expected}")
        names = ("bos_token_id", "eos_token_id") if self.hugging_face else ("bos_id", "eos_id")
        self.bos_id, self.eos_id = (getattr(tokenizer, name, None) for name in names)
        self._plain = lru_cache(_CACHED)(self._encode_plain)
        self.opening = self._measure_opening()

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        if self.hugging_face:
            return tuple(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))
        return tuple(int(token) for token in self.tokenizer.encode(text))

    def _measure_opening(self) -> tuple[int, ...]:
        if not self.hugging_face:
            return ()
        plain, whole = list(self._plain(_PROBE)), list(self.tokenizer.encode(_PROBE))
        for start in range(len(whole) - len(plain) + 1):
            if plain and whole[start : start + len(plain)] == plain:
                return tuple(whole[:start])
        raise ConfigError(f"tokenizer: got {whole} with and {plain} without special tokens, expected one in the other")

    def encode(self, text: str, *, opened: bool = False) -> tuple[int, ...]:
        """Return the ids of a text, if `opened` behind what the tokenizer puts first, but never behind it twice."""
        plain = self._plain(text)
        repeats = bool(self.opening) and plain[: len(self.opening)] == self.opening
        return (*self.opening, *plain) if opened and not repeats else plain

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without special tokens."""
        if self.hugging_face:
            options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            return str(self.tokenizer.decode(list(ids), **options))
        return str(self.tokenizer.decode(list(ids)))

    def prefix_id(self, chosen: int | None = None) -> int:
        """Return the token on which the first one of a text is conditioned: as chosen, else BOS, else EOS.

        Raises:
            ConfigError: there is none.
        """
        found = next((token for token in (chosen, self.bos_id, self.eos_id) if token is not None), None)
        if found is None:
            raise ConfigError("prefix_token_id: got none, and the tokenizer has no BOS or EOS, expected a token id")
        return int(found)

    def end_ids(self, others: int | Iterable[int] | None = None) -> tuple[int, ...]:
        """Return the ids that end a text: the tokenizer's own and others, in order."""
        more = () if others is None else (others,) if isinstance(others, int) else tuple(others)
        return tuple(dict.fromkeys(int(i) for i in (self.eos_id, *more) if i is not None))
