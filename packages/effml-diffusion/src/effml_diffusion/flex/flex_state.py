"""A noisy text of FlexMDM: the tokens that have appeared by a time, masks among them, and what is missing in its gaps.

A text of k present tokens has k + 1 gaps: gap i lies just before present token i, gap k after the last. With s the
original places of the present tokens, s[-1] = -1 and s[k] = n, exactly s[i] - s[i-1] - 1 tokens are missing in gap i.

    text      5 6 7 8          present   6 8 at places 1 3          gaps   1 1 0

Rows are left-aligned and padded. Cost: O(batch x seq) integers, no sort: a present token's new column is the number of
present tokens before it.

Source: arXiv 2509.01025, section 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effml_diffusion.flex.rows import place, round_up

__all__ = ["FlexState", "observe"]


class FlexState(NamedTuple):
    """Noisy texts with what a network is asked about them; columns from `lengths` on are padding."""

    ids: Tensor  # (batch, seq) int64: present tokens and masks, then pads
    mask: Tensor  # (batch, seq) bool: masks, where a token is to be predicted
    targets: Tensor  # (batch, seq) int64: the clean token of every real column
    places: Tensor  # (batch, seq) int64: its place in the clean text; beyond the real columns the text's length
    lengths: Tensor  # (batch,) int64
    gaps: Tensor  # (batch, seq + 1) int64: tokens missing just before each column; 0 beyond gap `lengths`
    gap_mask: Tensor  # (batch, seq + 1) bool: gaps that exist and are open
    flow_t: Tensor  # (batch,) float64

    def trim(self, multiple: int = 1) -> FlexState:
        """Drop columns that no row uses, down to a multiple: a forward pass costs what is there, not what may be."""
        longest = int(self.lengths.max()) if len(self.lengths) else 0
        seq = min(round_up(longest, multiple), self.ids.shape[1])
        columns = {name: getattr(self, name)[:, :seq] for name in ("ids", "mask", "targets", "places")}
        return self._replace(**columns, gaps=self.gaps[:, : seq + 1], gap_mask=self.gap_mask[:, : seq + 1])


def observe(
    ids: Tensor,
    lengths: Tensor,
    present: Tensor,
    masked: Tensor,
    flow_t: Tensor,
    *,
    mask_id: int,
    pad_id: int,
    closed: Tensor | None = None,
) -> FlexState:
    """Delete the tokens that are not present and replace those that are masked.

    Args:
        ids: clean texts (batch, seq), padded at the right.
        lengths: of the clean texts, (batch,).
        present: (batch, seq) bool, only read within the texts.
        masked: (batch, seq) bool, only read where present.
        flow_t: (batch,).
        mask_id: stands for a masked token.
        pad_id: stands beyond the text.
        closed: (batch, seq + 1) bool, junctions of the clean text, column j before token j, that are no gaps at all;
            the tokens at both their sides must be present.

    >>> x, n = torch.tensor([[5, 6, 7, 8]]), torch.tensor([4])
    >>> present, masked = torch.tensor([[False, True, False, True]]), torch.tensor([[False, False, False, True]])
    >>> state = observe(x, n, present, masked, torch.tensor([0.5]), mask_id=9, pad_id=0)
    >>> state.ids.tolist(), state.gaps.tolist()
    ([[6, 9, 0, 0]], [[1, 1, 0, 0, 0]])
    """
    seq = ids.shape[1]
    column = torch.arange(seq + 1, device=ids.device)
    present = present & (column[:seq] < lengths[:, None])
    to = torch.where(present, present.cumsum(1) - 1, seq)
    noisy = place(torch.where(masked, mask_id, ids), to, seq, pad_id)
    count = present.sum(1)

    beyond = lengths[:, None]
    places = place(column[:seq].expand_as(ids).contiguous(), to, seq, -1)
    places = torch.cat([places, torch.full_like(beyond, -1)], dim=1)
    places = torch.where(column < count[:, None], places, beyond)  # the sentinel s[k] = n
    before = torch.cat([torch.full_like(beyond, -1), places[:, :-1]], dim=1)
    real = column <= count[:, None]
    return FlexState(
        ids=noisy,
        mask=place(masked & present, to, seq, False),
        targets=place(ids, to, seq, pad_id),
        places=places[:, :seq],
        lengths=count,
        gaps=torch.where(real, places - before - 1, 0),
        gap_mask=real if closed is None else real & ~closed.gather(1, places),
        flow_t=flow_t,
    )
