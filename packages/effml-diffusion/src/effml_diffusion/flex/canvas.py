"""Texts that grow while they are generated: given tokens, masks, revealed tokens, and gaps open or closed to insertion.

A row of k tokens has k + 1 gaps, gap i just before token i, gap k at the end. A gap is closed where nothing may ever be
inserted; a mask inserted into an open gap has open gaps at both its sides. Given tokens never change, and keep their
order:

    empty        nothing given                          _
    prompt       given tokens, then an open end         A B _
    infill       one open gap between two texts         A B _ Y Z
    waypoints    given tokens, open gaps between        A _ G _ Z

Insertion moves every token by the number of masks inserted up to its own gap: one cumulative sum and one scatter for
the whole batch, O(batch x seq).

Source: arXiv 2509.01025; open and closed gaps in general are our own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_diffusion.flex.rows import Rows, place, right_pad, round_up

__all__ = ["Canvas"]


@dataclass(frozen=True, eq=False)
class Canvas:
    """A batch of growing texts; what stands beyond a row's length means nothing.

    Attributes:
        ids: (batch, seq) int64.
        lengths: (batch,) int64.
        closed: (batch, seq + 1) bool, gaps that take no insertion.

    >>> Canvas.prompt([[5, 6], [7]]).open_gaps.tolist()
    [[False, False, True], [False, True, False]]
    """

    ids: Tensor
    lengths: Tensor
    closed: Tensor

    def __post_init__(self) -> None:
        batch, seq = self.ids.shape
        if self.lengths.shape != (batch,) or self.closed.shape != (batch, seq + 1):
            shapes = f"{tuple(self.ids.shape)}, {tuple(self.lengths.shape)} and {tuple(self.closed.shape)}"
            raise ConfigError(f"ids, lengths, closed: got {shapes}, expected (batch, seq), (batch,), (batch, seq + 1)")

    @classmethod
    def empty(cls, batch: int) -> Canvas:
        """Return `batch` empty texts."""
        check_count("batch", batch, 1)
        return cls.waypoints([[]] * batch, open_ends=True)

    @classmethod
    def prompt(cls, rows: Rows) -> Canvas:
        """Return texts that go on after the given ones."""
        ids, lengths = right_pad(rows, 0)
        return cls(ids, lengths, _columns(ids) < lengths[:, None])

    @classmethod
    def infill(cls, prefix: Rows, suffix: Rows) -> Canvas:
        """Return texts with a given beginning and a given end, as many of the one as of the other."""
        before, after = list(prefix), list(suffix)
        if len(before) != len(after):
            raise ConfigError(f"suffix: got {len(after)} rows, expected {len(before)}, one for each prefix")
        parts = [[*map(int, a), *map(int, b)] for a, b in zip(before, after, strict=True)]
        ids, lengths = right_pad(parts, 0)
        junction = torch.tensor([len(row) for row in before])[:, None]
        return cls(ids, lengths, _columns(ids) != junction)

    @classmethod
    def waypoints(cls, rows: Rows, *, open_ends: bool = False) -> Canvas:
        """Return texts that have the given tokens in this order, and nothing outside the first and the last of them.

        open_ends: anything may also come before the first and after the last.
        """
        ids, lengths = right_pad(rows, 0)
        column = _columns(ids)
        ends = (column == 0) | (column == lengths[:, None])
        return cls(ids, lengths, torch.zeros_like(ends) if open_ends else ends)

    @property
    def real(self) -> Tensor:
        """(batch, seq) bool: columns that hold a token or a mask."""
        return _columns(self.ids)[:-1] < self.lengths[:, None]

    @property
    def open_gaps(self) -> Tensor:
        """(batch, seq + 1) bool: gaps that exist and may be inserted into."""
        return (_columns(self.ids) <= self.lengths[:, None]) & ~self.closed

    def to(self, device: torch.device) -> Canvas:
        """Return it on a device."""
        return Canvas(self.ids.to(device), self.lengths.to(device), self.closed.to(device))

    def padded(self, pad_id: int, multiple: int = 1) -> Canvas:
        """Return it with `pad_id` beyond each row's length, and as few columns as a multiple allows."""
        nothing = torch.zeros_like(self.closed, dtype=torch.int64)
        return self.insert(nothing, mask_id=pad_id, pad_id=pad_id, multiple=multiple)

    def masks(self, mask_id: int) -> Tensor:
        """Return where masks stand, (batch, seq) bool."""
        return (self.ids == mask_id) & self.real

    def reveal(self, index: Tensor, tokens: Tensor) -> Canvas:
        """Return it with tokens (n,) at flat positions (n,) of (batch, seq)."""
        return replace(self, ids=self.ids.flatten().index_copy(0, index, tokens).view_as(self.ids))

    def insert(self, counts: Tensor, *, mask_id: int, pad_id: int, multiple: int = 1) -> Canvas:
        """Return it with counts (batch, seq + 1) new masks in the gaps; counts at gaps that are not open are ignored.

        New columns are rounded up to a multiple; a gap's masks stand before the token that the gap was before.

        >>> canvas = Canvas.prompt([[5]]).insert(torch.tensor([[9, 2]]), mask_id=1, pad_id=0)
        >>> canvas.ids.tolist(), canvas.closed.tolist()
        ([[5, 1, 1]], [[True, False, False, False]])
        """
        column = _columns(self.ids)
        counts = torch.where(self.open_gaps, counts, 0)
        lengths = self.lengths + counts.sum(1)
        width = round_up(int(lengths.max()), multiple)
        to = column + counts.cumsum(1)  # the end gap is a column of its own, and moves like a token
        exists = column <= self.lengths[:, None]
        closed = place(self.closed, torch.where(exists, to, width + 1), width + 1, False)
        ids = place(self.ids, torch.where(self.real, to[:, :-1], width), width, mask_id)
        beyond = torch.arange(width, device=ids.device) >= lengths[:, None]
        return Canvas(ids.masked_fill(beyond, pad_id), lengths, closed)


def _columns(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1] + 1, device=ids.device)
