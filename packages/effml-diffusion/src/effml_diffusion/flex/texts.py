"""Clean texts as a padded batch, with what of them is given: checked once, at the boundary.

Fixed tokens (prompts, waypoints) are always there and never masked. A closed junction, column j just before token j of
the clean text, is no gap: nothing may ever be inserted there, as between the tokens of a prompt. Waypoints are fixed
tokens with junctions that are not closed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_diffusion.flex.rows import Rows, right_pad, row_lengths
from effml_diffusion.value_checks import check_values

__all__ = ["Flags", "Texts", "check_texts"]

Flags = Tensor | Sequence[Sequence[bool] | Tensor]
"""Booleans for the tokens of `Rows`, in the same form."""


class Texts(NamedTuple):
    """Clean texts, padded at the right."""

    ids: Tensor  # (batch, seq) int64
    lengths: Tensor  # (batch,) int64
    fixed: Tensor  # (batch, seq) bool; False beyond the text
    closed: Tensor | None  # (batch, seq + 1) bool; None: no junction

    @property
    def n_free(self) -> Tensor:
        """(batch,) int64: tokens that are not given."""
        return self.lengths - self.fixed.sum(1)

    def take(self, rows: Tensor) -> Texts:
        """Return some rows (n,), each as often as it is named."""
        closed = None if self.closed is None else self.closed[rows]
        return Texts(self.ids[rows], self.lengths[rows], self.fixed[rows], closed)


def check_texts(
    x: Rows,
    fixed: Flags | None,
    closed: Tensor | None,
    *,
    mask_id: int,
    pad_id: int,
    max_length: int,
    device: torch.device | None = None,
) -> Texts:
    """Return clean texts padded.

    Args:
        x: (batch, seq) padded with pad_id, or ragged rows.
        fixed: bool like x, True at given tokens. None: nowhere.
        closed: (batch, seq + 1) bool, True where nothing is ever inserted; both neighbours must be fixed, or the end.
        mask_id, pad_id: tokens that no text holds.
        max_length: of a text.
        device: where ragged rows go.

    Raises:
        ConfigError: shapes or types disagree, a pad stands within a text, or (seen on a CPU only) a text is too long or
            holds masks or negative ids, a pad is fixed, or a junction is closed beside a token that is not fixed.

    >>> check_texts([[5, 6], [7]], None, None, mask_id=1, pad_id=0, max_length=2).ids.tolist()
    [[5, 6], [7, 0]]
    """
    if isinstance(x, Tensor) and (x.ndim != 2 or x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        raise ConfigError(f"x: got {x.dtype} of shape {tuple(x.shape)}, expected integer ids (batch, seq)")
    if isinstance(x, Tensor):
        ids = x.long()
        lengths = row_lengths(ids, pad_id)
    else:
        ids, lengths = right_pad(x, pad_id, device=device)
        if not torch.equal(row_lengths(ids, pad_id), lengths):
            raise ConfigError(f"x: got pad_id {pad_id} at the end of a text, expected it nowhere")
    if fixed is None:
        fixed = torch.zeros_like(ids, dtype=torch.bool)
    elif not isinstance(fixed, Tensor):
        fixed = right_pad(fixed, False, device=ids.device)[0]
    if fixed.shape != ids.shape or fixed.dtype != torch.bool:
        raise ConfigError(f"fixed: got {fixed.dtype} {tuple(fixed.shape)}, expected bool {tuple(ids.shape)}")
    junctions = (len(ids), ids.shape[1] + 1)
    if closed is not None and (closed.shape != junctions or closed.dtype != torch.bool):
        raise ConfigError(f"closed: got {closed.dtype} {tuple(closed.shape)}, expected bool {junctions}")
    texts = Texts(ids, lengths, fixed, closed)
    _check_values(texts, mask_id, max_length)
    return texts


def _check_values(texts: Texts, mask_id: int, max_length: int) -> None:
    ids, lengths, fixed, closed = texts
    column = torch.arange(ids.shape[1] + 1, device=ids.device)
    real = column[:-1] < lengths[:, None]
    check_values("x", lengths, lengths <= max_length, f"texts of at most max_length = {max_length} tokens")
    check_values("x", ids, ((ids != mask_id) & (ids >= 0)) | ~real, f"no mask ({mask_id}) and no negative id")
    check_values("fixed", fixed, ~fixed | real, "it within the texts only")
    if closed is not None:
        edge = torch.ones(len(ids), 1, dtype=torch.bool, device=ids.device)
        before = torch.cat([edge, fixed], 1)
        after = torch.cat([fixed, edge], 1).scatter(1, lengths[:, None], True)
        holds = ~closed | (before & after) | (column > lengths[:, None])
        check_values("closed", closed, holds, "it between fixed tokens, or one and an end, only")
