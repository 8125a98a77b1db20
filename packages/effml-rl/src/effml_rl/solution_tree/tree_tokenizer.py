"""Words of the solution-tree task as token ids: nine symbols and the integers from 0.

    0 <unk>   1 <bos>   2 <pad>, which also ends a text   3 ":"   4 S   5 P   6 C   7 A   8 I   9 "0"   10 "1"  ...

Source: arXiv 2505.22756, synthetic task: 29 words for 20 integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from effml_shared.checks import check_count
from numpy.typing import NDArray

__all__ = ["TreeTokenizer"]

_SYMBOLS = ("<unk>", "<bos>", "<pad>", ":", "S", "P", "C", "A", "I")


class TreeTokenizer:
    """Use white-space separated words as ids; every text round-trips, up to white space and unknown words.

    Raises:
        ConfigError: `n_integers` is below 1.

    >>> tokenizer = TreeTokenizer(20)
    >>> tokenizer.encode("S 9 A 0 <pad>").tolist(), tokenizer.vocab_size
    ([4, 18, 7, 9, 2], 29)
    >>> tokenizer.decode([4, 18, 2, 2])
    'S 9 <pad> <pad>'
    """

    unk_id, bos_id, pad_id, eos_id = 0, 1, 2, 2
    colon, state, problem, context, action, irrelevant = 3, 4, 5, 6, 7, 8
    first_integer = len(_SYMBOLS)

    def __init__(self, n_integers: int) -> None:
        check_count("n_integers", n_integers, 1)
        self.words = (*_SYMBOLS, *map(str, range(n_integers)))
        self.n_integers = n_integers
        self.vocab_size = len(self.words)
        self.name = f"solution tree {n_integers}"
        self._ids = {word: index for index, word in enumerate(self.words)}

    def encode(self, text: str) -> NDArray[np.int64]:
        """Return the ids of `text`, `(words,)`; `<unk>` where a word is not known."""
        return np.array([self._ids.get(word, self.unk_id) for word in text.split()], np.int64)

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the words of `ids`, padding included: what a verifier wants to see; `<unk>` outside the vocabulary."""
        return " ".join(self.words[i] if 0 <= i < self.vocab_size else "<unk>" for i in np.asarray(ids).tolist())
