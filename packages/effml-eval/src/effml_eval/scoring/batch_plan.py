"""Which rows go through the model together.

Rows are ordered by length, the longest first: a batch that does not fit into memory is met at once, and little is spent
on padding. Rows of one context stay together, so that the context is read once for all its choices, and rows with equal
inputs are one row. The order depends on the content of rows alone, and cutting the rows of one batch again gives that
batch: so a batch that is run alone, after an interruption, gives the numbers it gave among all the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from effml_eval.scoring.token_boundaries import Row

__all__ = ["cut", "plan_rows"]


def cut(lengths: Sequence[int], budget: int) -> list[slice]:
    """Cut a list into stretches of which size times the greatest length stays within the budget, or of one item.

    >>> cut([5, 4, 4, 2, 2, 2, 9], budget=10)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 6, None), slice(6, 7, None)]
    """
    stretches, start, longest = [], 0, 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        if i > start and (i + 1 - start) * longest > budget:
            stretches.append(slice(start, i))
            start, longest = i, length
    return [*stretches, slice(start, len(lengths))] if lengths else []


def plan_rows(rows: Sequence[Row], budget: int) -> list[list[int]]:
    """Return the batches as indices into rows; equal inputs, scored at equal places, count once towards the budget."""
    members: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for i, row in enumerate(rows):
        members.setdefault((row.context, row.read), []).append(i)
    longest: dict[tuple[int, ...], int] = {}
    for context, read in members:
        longest[context] = max(longest.get(context, 0), len(context) + len(read))

    def rank(key: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[int, tuple[int, ...], int, tuple[int, ...]]:
        context, read = key
        return -longest[context], context, -len(read), read

    order = sorted(members, key=rank)
    stretches = cut([len(context) + len(read) for context, read in order], budget)
    return [[i for key in order[stretch] for i in members[key]] for stretch in stretches]
