"""The inputs that activate each concept most: what a reader looks at first.

Cost: a sort of the stored codes. Memory: that of their list of entries, plus 16 bytes per answer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from effml_shared.checks import check_count
from torch import Tensor

from effml_eval.concepts.code_entries import Codes, Entries, check_codes, concept_blocks

__all__ = ["TopInputs", "top_inputs"]


class TopInputs(NamedTuple):
    """Rows and codes of the strongest activations of every concept, strongest first.

    Fields:
        rows: (C, top) int64, -1 where a concept fires on fewer rows.
        codes: (C, top), 0 there.
    """

    rows: Tensor
    codes: Tensor


def top_inputs(codes: Codes, top: int) -> TopInputs:
    """Return the `top` rows of the largest positive code for every concept; of equals, the lowest row first.

    Raises:
        ConfigError: `top` is below 1, or the codes are not finite.

    >>> top_inputs(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), 2).rows
    tensor([[ 1,  0],
            [ 2, -1]])
    """
    check_count("top", top, 1)
    check_codes("codes", codes)
    found = [_top(stop - start, block, top) for start, stop, (block,) in concept_blocks(codes)]
    return TopInputs(*(torch.cat(column) for column in zip(*found, strict=True)))


def _top(n_concepts: int, block: Entries, top: int) -> TopInputs:
    positive = block.values > 0
    rows, concepts, values = (column[positive] for column in block)
    order = values.argsort(descending=True, stable=True)  # entries come by rows
    order = order[concepts[order].argsort(stable=True)]
    rows, concepts, values = rows[order], concepts[order], values[order]
    counts = concepts.bincount(minlength=n_concepts)
    ranks = torch.arange(len(concepts), device=concepts.device) - (counts.cumsum(0) - counts)[concepts]
    kept = ranks < top
    answer = TopInputs(rows.new_full((n_concepts, top), -1), values.new_zeros(n_concepts, top))
    answer.rows[concepts[kept], ranks[kept]] = rows[kept]
    answer.codes[concepts[kept], ranks[kept]] = values[kept]
    return answer
