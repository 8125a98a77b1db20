"""The one record of sampled completions: every sampler returns it, every loss reads it.

Rows are rollouts; the n samples of a prompt are neighbours. Prompts are padded on the left to P tokens and completions
on the right to T, so that the completion starts at index P in every row and the logits at P-1+t emit its token t.

The completion mask holds every sampled token up to and including the first end-of-sequence token: without that token a
policy never learns to stop. It is found by the first such token and not by `ids != pad`, since the two are often one
id. A completion that was cut off has no such token, is counted whole, and is `truncated`. Masked slots inside a
completion (what a tool wrote) are allowed.

State: 9 P + 13 T bytes per row, of int64 ids, boolean masks and float32 log-probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor

__all__ = ["RolloutBatch", "completion_mask"]


def completion_mask(completion_ids: Tensor, eos_token_id: int | Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the mask (batch, T) of tokens up to and including the first end, and which rows (batch,) have none.

    >>> mask, truncated = completion_mask(torch.tensor([[5, 2, 7, 7], [5, 6, 7, 8], [2, 2, 2, 2]]), eos_token_id=2)
    >>> mask.int().tolist(), truncated.tolist()
    ([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], [False, True, False])
    """
    ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    if not ends:
        raise ConfigError("eos_token_id: got none, expected at least one id")
    if completion_ids.ndim != 2:
        raise ConfigError(f"completion_ids: got shape {tuple(completion_ids.shape)}, expected (batch, T)")
    is_end = torch.isin(completion_ids, torch.tensor(ends, device=completion_ids.device))
    ends_before = is_end.cumsum(1) - is_end.long()
    return ends_before == 0, ~is_end.any(1)


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """Prompts, their sampled completions, and what the sampler knew of them.

    Indexing with a slice or a row mask gives the batch of those rows; `len` is the number of rows.

    Raises:
        ConfigError: shapes disagree, a mask is not boolean, a prompt is empty or padded on the right, or a completion
            has no token.
    """

    prompt_ids: Tensor  # (batch, P) int64
    prompt_mask: Tensor  # (batch, P) bool, False at the padding on the left
    completion_ids: Tensor  # (batch, T) int64
    completion_mask: Tensor  # (batch, T) bool, see the module
    truncated: Tensor  # (batch,) bool: stopped by the length limit
    group_index: Tensor  # (batch,) int64: which prompt a row belongs to
    sampler_logps: Tensor | None = None  # (batch, T) nats: of each token, under what the sampler drew it from

    def __post_init__(self) -> None:
        batch, prompt = self._shape("prompt_ids", 2)
        _, completion = self._shape("completion_ids", 2)
        expected: dict[str, tuple[int, ...]] = {
            "prompt_mask": (batch, prompt),
            "completion_ids": (batch, completion),
            "completion_mask": (batch, completion),
            "truncated": (batch,),
            "group_index": (batch,),
            "sampler_logps": (batch, completion),
        }
        for name, tensor in self.tensors().items():
            if name in expected and tuple(tensor.shape) != expected[name]:
                raise ConfigError(f"{name}: got shape {tuple(tensor.shape)}, expected {expected[name]}")
            if name in ("prompt_mask", "completion_mask", "truncated") and tensor.dtype != torch.bool:
                raise ConfigError(f"{name}: got {tensor.dtype}, expected torch.bool")
        gaps = self.prompt_mask[:, 1:] < self.prompt_mask[:, :-1]  # a real token before padding
        if not prompt or bool(gaps.any()) or not bool(self.prompt_mask[:, -1].all()):
            raise ConfigError(
                "prompt_mask: got an empty prompt or padding inside or right of one, expected it on the left"
            )
        if not bool(self.completion_mask.any(1).all()):
            raise ConfigError("completion_mask: got a row without tokens, expected at least the end of sequence")

    def _shape(self, name: str, dims: int) -> tuple[int, ...]:
        shape = tuple(getattr(self, name).shape)
        if len(shape) != dims:
            raise ConfigError(f"{name}: got shape {shape}, expected {dims} dimensions")
        return shape

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def __getitem__(self, rows: slice | Tensor) -> RolloutBatch:
        return RolloutBatch(**{name: tensor[rows] for name, tensor in self.tensors().items()})

    @property
    def input_ids(self) -> Tensor:
        """Prompts and completions as a model reads them, (batch, P + T)."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """Return the mask of `input_ids`: padding and what follows the end are False."""
        return torch.cat([self.prompt_mask, self.completion_mask], dim=1)

    @property
    def lengths(self) -> Tensor:
        """Sampled tokens per row, (batch,)."""
        return self.completion_mask.sum(1)

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields by name, without those that are None: a batch for `GradientStep`."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to(self, device: torch.device | str) -> RolloutBatch:
        """Return the batch with every tensor on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def split(self, rows: int) -> list[RolloutBatch]:
        """Cut into batches of at most `rows` rows, in order."""
        check_count("rows", rows, 1)
        return [self[start : start + rows] for start in range(0, len(self), rows)]

    @staticmethod
    def cat(batches: Iterable[RolloutBatch], pad_token_id: int = 0) -> RolloutBatch:
        """Join batches, padded to the longest prompt and completion. Group indices are kept as they are.

        Raises:
            ConfigError: there is no batch, or only some have sampler log-probabilities.
        """
        batches = list(batches)
        if not batches:
            raise ConfigError("batches: got none, expected at least one")
        if len({batch.sampler_logps is None for batch in batches}) > 1:
            raise ConfigError("sampler_logps: got some batches with and some without them, expected all or none")
        prompt = max(batch.prompt_ids.shape[1] for batch in batches)
        completion = max(batch.completion_ids.shape[1] for batch in batches)

        def padded(name: str, tensor: Tensor) -> Tensor:
            fill = pad_token_id if name.endswith("_ids") else 0
            if name.startswith("prompt"):
                return F.pad(tensor, (prompt - tensor.shape[1], 0), value=fill)
            return F.pad(tensor, (0, completion - tensor.shape[1]), value=fill) if tensor.ndim == 2 else tensor

        names = batches[0].tensors()
        return RolloutBatch(
            **{name: torch.cat([padded(name, batch.tensors()[name]) for batch in batches]) for name in names}
        )
