"""Text to token ids and back: raw UTF-8 bytes, or the vocabulary of a Hugging Face `tokenizer.json`.

A document is plain text to both: nothing written in it becomes a special token, and no special token is added to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from effml_shared.errors import DataError, require

__all__ = ["ByteTokenizer", "FileTokenizer", "Tokenizer", "load_tokenizer"]

# What well-known vocabularies call the end of a document and padding; the first that is present is taken.
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>", "[SEP]")
PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<｜▁pad▁｜>")


class Tokenizer(Protocol):
    """What the data floor asks of a tokenizer: equal names mean equal ids, all in `[0, vocab_size)`."""

    name: str
    vocab_size: int
    eos_id: int
    pad_id: int

    def encode(self, text: str) -> NDArray[np.int64] | Sequence[int]: ...

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str: ...


class ByteTokenizer:
    """Use UTF-8 bytes as ids 0..255, 256 for the end of a document and 257 for padding.

    >>> ByteTokenizer().encode("né").tolist(), ByteTokenizer().decode([110, 195, 169, 256])
    ([110, 195, 169], 'né')
    """

    name, vocab_size, eos_id, pad_id = "byte", 258, 256, 257

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the bytes of `text`, `(length,)`; a lone surrogate, which UTF-8 cannot hold, becomes `?`."""
        return np.frombuffer(text.encode(errors="replace"), np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of `ids`, skipping what is no byte and showing broken UTF-8 as U+FFFD."""
        values = np.asarray(ids)
        return values[(values >= 0) & (values < 256)].astype(np.uint8).tobytes().decode(errors="replace")


class FileTokenizer:
    """Use the vocabulary of a `tokenizer.json`, as `load_tokenizer` describes it."""

    def __init__(self, path: str | Path, eos_token: str | None = None) -> None:
        library = require("tokenizers", extra="effml-shared[data]", purpose="to read a tokenizer.json")
        where = f"tokenizer {str(path)!r}"
        try:
            content = Path(path).read_bytes()
            self._tokenizer = library.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library has no class of its own for a damaged file
            reason = str(error).partition("\n")[0]
            raise DataError(f"{where}: got {reason}, expected 'byte' or the path of a tokenizer.json") from None
        # A file may ask for truncation and padding, and specials may be found in text: each would corrupt a corpus.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab()
        eos = next((name for name in ([eos_token] if eos_token else EOS_NAMES) if name in ids), None)
        if eos is None:
            added = [token.content for token in self._tokenizer.get_added_tokens_decoder().values()]
            raise DataError(f"{where}: got no token {eos_token or 'known to end text'}, expected eos_token in {added}")
        self.eos_id, self.pad_id = ids[eos], next(ids[name] for name in (*PAD_NAMES, eos) if name in ids)
        self.vocab_size = max(ids.values()) + 1  # ids may have gaps: their count would be too small
        self.name = f"{hashlib.sha256(content).hexdigest()[:16]} {eos}"

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of `text`, `(length,)`."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of `ids` without special tokens."""
        return str(self._tokenizer.decode([int(i) for i in ids if 0 <= i < self.vocab_size]))


def load_tokenizer(spec: str, *, eos_token: str | None = None) -> Tokenizer:
    """Return the tokenizer that `spec` names: `"byte"`, or the path of a `tokenizer.json`.

    A `tokenizer.json` does not say what ends a document: that is `eos_token` if given, else the first of `EOS_NAMES`
    in the vocabulary. Padding is the first of `PAD_NAMES`, else the end-of-document token: no loss ever sees it.

    Raises:
        DataError: the file is missing, a folder or damaged, or has no token that ends a document.
    """
    return ByteTokenizer() if spec == "byte" else FileTokenizer(spec, eos_token)
