"""Ragged rows as padded tensors: padding at the right, and moving what a row holds to other columns.

Every operation is over the whole batch at once; `place` is the one that both deletes (compaction) and inserts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_diffusion.value_checks import check_values

__all__ = ["Rows", "place", "right_pad", "round_up", "row_lengths"]

Rows = Tensor | Sequence[Sequence[int] | Tensor]
"""Rows of one length as a tensor (batch, seq), or ragged rows as lists or one-dimensional tensors."""


def right_pad(rows: Rows, fill: int | bool, *, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Return the rows left-aligned, (batch, longest), and their lengths (batch,); int64, or bool where `fill` is.

    Raises:
        ConfigError: a row is not one-dimensional, or there is no row.

    >>> right_pad([[1, 2, 3], [], [4]], fill=0)[0].tolist()
    [[1, 2, 3], [0, 0, 0], [4, 0, 0]]
    """
    dtype = torch.bool if isinstance(fill, bool) else torch.int64
    parts = [torch.as_tensor(row, dtype=dtype, device=device) for row in rows]
    if not parts or any(part.ndim != 1 for part in parts):
        raise ConfigError(f"rows: got shapes {[tuple(p.shape) for p in parts]}, expected at least one row of tokens")
    lengths = torch.tensor([len(part) for part in parts], device=parts[0].device)
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=fill), lengths


def row_lengths(ids: Tensor, pad_id: int) -> Tensor:
    """Return how many tokens each row of ids (batch, seq) holds before its padding, (batch,).

    Raises:
        ConfigError: (seen on a CPU only) a token stands to the right of a pad, as when an end-of-text token serves as
            padding.
    """
    real = ids != pad_id
    if ids.shape[1]:
        check_values("x", ids[:, 1:], real[:, :-1] | ~real[:, 1:], f"no token to the right of a pad ({pad_id})")
    return real.sum(1)


def place(values: Tensor, columns: Tensor, width: int, fill: int | bool) -> Tensor:
    """Return rows (batch, width) of `fill` in which values (batch, seq) stand at columns (batch, seq) in [0, width].

    What goes to column `width` is dropped; no other column may be named twice in a row.

    >>> place(torch.tensor([[7, 8, 9]]), torch.tensor([[1, 4, 2]]), width=4, fill=0).tolist()
    [[0, 7, 9, 0]]
    """
    return values.new_full((len(values), width + 1), fill).scatter_(1, columns, values)[:, :width]


def round_up(length: int, multiple: int) -> int:
    """Return the least multiple, above 0, that is at least the length: few distinct shapes, and none of them empty."""
    return max(-(-length // multiple), 1) * multiple
