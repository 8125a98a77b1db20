"""Supervised fine-tuning on completions: ragged rows of prompt and completion, and their negative log-likelihood.

Sum of -log p(y_t | x, y_<t) over the counted tokens y_t, and their number: what `effml_shared.steps.GradientStep` adds
up over micro-batches and ranks before it divides once. Counted are the completion's tokens, the end among them, or with
`prompt_loss` the prompt's as well, save its first, which nothing predicts.

A row is padded on the right to the longest of its batch. There a causal model needs no mask: no counted token sees the
padding, and the padding is not counted. `effml_shared.data.Loader` serves the rows in an order of its own and keeps
the position that goes into a checkpoint.

State: 2 bytes per token for vocabularies up to 65,536, else 4, and 16 bytes per row. Cost of the loss beside the
model's: float32 logits of `chunk` tokens at a time, computed again in the backward pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from effml_shared.data import Batch
from effml_shared.errors import ConfigError, DataError
from effml_shared.tensors import IGNORE_INDEX, chunked_cross_entropy
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["SupervisedDataset", "supervised_loss"]


class SupervisedDataset:
    """Prompts with the completions to learn, for `effml_shared.data.Loader`.

    Args:
        prompts, completions: token ids, one sequence per row, none of them empty. The end-of-sequence token is part of
            a completion, if the model is to learn to stop.
        prompt_loss: count the prompts' tokens too.
        pad_id: fills a batch up; any id of the vocabulary.

    Raises:
        ConfigError: there are not as many prompts as completions, one is empty, or not of token ids.
        DataError: there is no row.

    >>> dataset = SupervisedDataset([[5, 6], [7]], [[8, 1], [9, 9, 1]])
    >>> batch = dataset.batch(np.array([0, 1]))
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[5, 6, 8, 1], [7, 9, 9, 1]], [[-100, -100, 8, 1], [-100, 9, 9, 1]])
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int] | NDArray[Any] | Tensor],
        completions: Sequence[Sequence[int] | NDArray[Any] | Tensor],
        *,
        prompt_loss: bool = False,
        pad_id: int = 0,
    ) -> None:
        if len(prompts) != len(completions):
            raise ConfigError(f"completions: got {len(completions)}, expected one for each of {len(prompts)} prompts")
        rows = [_ids(row) for pair in zip(prompts, completions, strict=True) for row in pair]
        lengths = np.array([len(row) for row in rows], np.int64).reshape(-1, 2)
        self._set(np.concatenate([np.empty(0, np.int64), *rows]), lengths, prompt_loss, pad_id)

    @classmethod
    def from_padded(
        cls,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_ids: Tensor,
        completion_mask: Tensor,
        *,
        prompt_loss: bool = False,
        pad_id: int = 0,
    ) -> SupervisedDataset:
        """Make one of padded ids and boolean masks, (rows, P) and (rows, T), as a `RolloutBatch` holds them.

        Raises:
            ConfigError: shapes do not fit each other, or a row's prompt or completion is empty.
        """
        for name, ids, mask in (
            ("prompt_mask", prompt_ids, prompt_mask),
            ("completion_mask", completion_ids, completion_mask),
        ):
            if mask.dtype != torch.bool or mask.ndim != 2 or mask.shape != ids.shape or len(mask) != len(prompt_ids):
                got, expected = f"{mask.dtype} {tuple(mask.shape)}", f"torch.bool {tuple(ids.shape)}, equally many rows"
                raise ConfigError(f"{name}: got {got}, expected {expected}")
        tokens = torch.cat([prompt_ids, completion_ids], 1)[torch.cat([prompt_mask, completion_mask], 1)]
        lengths = torch.stack([prompt_mask.sum(1), completion_mask.sum(1)], 1)
        dataset = cls.__new__(cls)
        dataset._set(tokens.cpu().numpy(), lengths.cpu().numpy(), prompt_loss, pad_id)
        return dataset

    def _set(self, tokens: NDArray[Any], lengths: NDArray[np.int64], prompt_loss: bool, pad_id: int) -> None:
        """Keep rows that lie end to end; lengths (rows, 2) of prompt and completion."""
        if not len(lengths):
            raise DataError("got no rows to fine-tune on, expected at least one prompt with its completion")
        if not lengths.all():
            row = int(np.flatnonzero(~lengths.all(1))[0])
            raise ConfigError(f"row {row}: got an empty prompt or completion, expected at least one token of each")
        if tokens.min() < 0 or pad_id < 0:
            raise ConfigError(f"ids: got {min(int(tokens.min()), pad_id)}, expected token ids of at least 0")
        self.tokens = tokens.astype(np.uint16 if tokens.max() < 1 << 16 else np.uint32)
        self.lengths, self.prompt_loss, self.pad_id = lengths, prompt_loss, pad_id
        self._starts = np.cumsum(lengths.sum(1)) - lengths.sum(1)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """Return the rows `indices` (batch,), possibly none.

        Returns:
            `input_ids` and `labels`, the ids but -100 where not counted: int64 (batch, longest of these rows).
        """
        prompt, total = self.lengths[indices, 0], self.lengths[indices].sum(1)
        column = np.arange(total.max(initial=1))
        real = column < total[:, None]
        places = np.where(real, self._starts[indices][:, None] + column, 0)
        ids = np.where(real, self.tokens[places], self.pad_id).astype(np.int64)
        first = np.ones_like(prompt) if self.prompt_loss else prompt
        labels = np.where(real & (column >= first[:, None]), ids, IGNORE_INDEX)
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """JSON values that change with any row."""
        content = hashlib.sha256(self.tokens.astype(np.uint32).tobytes())
        content.update(self.lengths.tobytes())
        return {"rows": len(self), "prompt_loss": self.prompt_loss, "content": content.hexdigest()}


def _ids(row: Sequence[int] | NDArray[Any] | Tensor) -> NDArray[np.int64]:
    found = np.asarray(row)
    if found.ndim != 1 or (len(found) and found.dtype.kind not in "iu"):
        raise ConfigError(f"row: got {row!r:.60}, expected a sequence of token ids")
    return found.astype(np.int64)


def supervised_loss(model: nn.Module, batch: Batch, *, chunk: int = 2048) -> tuple[Tensor, Tensor]:
    """Return the negative log-likelihood in nats summed over the counted tokens, and their number: a `Loss`.

    Args:
        model: causal; called with `input_ids`, returns an object with `.logits` (batch, seq, vocab).
        batch: as `SupervisedDataset.batch` makes it.
        chunk: tokens whose float32 logits are alive at a time.

    Raises:
        ConfigError: the model returns no such logits.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    logits = getattr(model(ids), "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise ConfigError(f"model: got an output without logits {(*ids.shape, 'vocab')}, expected a language model's")
    # Labels move to the places that predict them; cutting the logits instead would copy them.
    targets = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORE_INDEX)], dim=1)
    return chunked_cross_entropy(logits, nn.Identity(), targets, chunk=chunk)
