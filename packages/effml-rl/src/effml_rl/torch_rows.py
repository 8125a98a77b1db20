"""Rows of a model decoded with torch: prompts read once, copied to any number of rows, and rows that leave.

Prompts are padded on the left to the longest. A row that leaves stays in the batch, fed with padding, until less than
half of the batch is alive: then the others move to a smaller cache, which costs a copy of theirs, so that all such
copies together are at most one of the first. Cost of a step: a forward pass of at most twice the living rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from effml_shared.generation import Decoder, make_decoder
from effml_shared.tensors import left_pad
from torch import Tensor, nn

__all__ = ["TorchRows"]


class TorchRows:
    """Decode rows of any model that `effml_shared.generation.make_decoder` knows, at most max_new_tokens each."""

    def __init__(self, model: nn.Module, max_new_tokens: int, pad_token_id: int, device: torch.device) -> None:
        self.model, self.max_new_tokens, self.pad_token_id, self.device = model, max_new_tokens, pad_token_id, device
        self._prompts: Decoder
        self._decoder: Decoder
        self._places: Tensor | None = None  # of the rows that have not left, in the batch; None: all are there
        self._size = 0  # of the batch

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read prompts in place of any earlier ones, and return the logits (prompts, vocab) that follow each."""
        ids, mask = left_pad(prompts, self.pad_token_id)
        self._prompts = make_decoder(self.model, ids.shape[1] + self.max_new_tokens)
        return self._prompts(ids.to(self.device), None if bool(mask.all()) else mask.to(self.device))

    def start(self, prompts: Tensor) -> None:
        """Begin rows after these prompts, by number, in place of any earlier rows."""
        self._decoder, self._places, self._size = self._prompts.fork(prompts), None, len(prompts)

    def step(self, ids: Tensor, kept: Tensor | None = None) -> Tensor:
        """Append ids (rows,) to the rows numbered `kept` of the last step, and return logits (rows, vocab).

        The other rows leave. None: all rows are kept.
        """
        if kept is not None:
            self._places = kept if self._places is None else self._places[kept]
        if self._places is not None and 2 * len(self._places) < self._size:
            self._decoder.select(self._places)
            self._places, self._size = None, len(ids)
        if self._places is None:
            return self._decoder(ids[:, None])
        batch = ids.new_full((self._size, 1), self.pad_token_id)
        batch[self._places, 0] = ids
        return self._decoder(batch)[self._places]
