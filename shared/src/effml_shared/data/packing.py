"""Documents packed end to end into windows of equal length, without a label that crosses a document.

State: one flat array of ids (2 bytes each up to 65,536 ids, else 4) and 8 bytes per document. Windows of `S` tokens
overlap by one: the last token of one is the first of the next, so that every token but the very first is predicted
exactly once. What remains at the end, too short for a window, is dropped. Labels stand beside the ids they equal, as
models that shift them inside expect (Hugging Face's convention).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from effml_shared.data.tokenizers import Tokenizer
from effml_shared.errors import ConfigError, DataError

__all__ = ["Batch", "PackedDataset", "collate_windows"]

Batch = dict[str, Tensor]


def collate_windows(tokens: NDArray[Any], documents: NDArray[Any]) -> Batch:
    """Make a batch from windows of ids and of the documents they belong to, both `(batch, seq)`.

    Returns:
        `input_ids`, `labels` (the ids, but -100 where the id before it is of another document or window) and `doc_ids`
        (counted from 0 in each row), all int64 `(batch, seq)`.

    >>> batch = collate_windows(np.array([[7, 8, 0, 9]]), np.array([[4, 4, 4, 5]]))
    >>> batch["labels"].tolist(), batch["doc_ids"].tolist()
    ([[-100, 8, 0, -100]], [[0, 0, 0, 1]])
    """
    ids, owners = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(documents - documents[:, :1])
    labels = torch.where(owners == owners.roll(1, dims=1), ids, -100)
    labels[:, :1] = -100
    return {"input_ids": ids, "labels": labels, "doc_ids": owners}


class PackedDataset:
    """Tokenise documents, each followed by `eos_id`, and serve windows of `seq_len` tokens.

    Raises:
        ConfigError: `seq_len` is below 2: a window must predict something.
        DataError: the documents do not fill one window.

    >>> from effml_shared.data.tokenizers import ByteTokenizer
    >>> dataset = PackedDataset(["abc", "de"], ByteTokenizer(), seq_len=4)
    >>> len(dataset), dataset.batch(np.array([1]))["labels"].tolist()
    (2, [[-100, -100, 101, 256]])
    """

    def __init__(self, documents: Iterable[str], tokenizer: Tokenizer, seq_len: int) -> None:
        if seq_len < 2:
            raise ConfigError(f"seq_len: got {seq_len}, expected an integer >= 2")
        dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
        pieces = [np.append(tokenizer.encode(text), tokenizer.eos_id).astype(dtype) for text in documents]
        self.tokenizer, self.seq_len = tokenizer, seq_len
        self.tokens = np.concatenate([np.empty(0, dtype), *pieces])
        self.ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        if len(self) < 1:
            use = "use more text, a smaller seq_len or, for a held-out part, a larger share"
            raise DataError(f"got {len(self.tokens)} tokens of text, expected at least seq_len = {seq_len}: {use}")

    def __len__(self) -> int:
        return max(len(self.tokens) - 1, 0) // (self.seq_len - 1)

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the windows `indices` `(batch,)`, possibly none, as `collate_windows` describes them."""
        places = indices[:, None] * (self.seq_len - 1) + np.arange(self.seq_len)
        return collate_windows(self.tokens[places], np.searchsorted(self.ends, places, side="right"))

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """JSON values that change with any window."""
        content = hashlib.sha256(self.tokens.data)
        content.update(self.ends.data)
        shape = {"windows": len(self), "seq_len": self.seq_len, "tokenizer": self.tokenizer.name}
        return {**shape, "content": content.hexdigest()}
