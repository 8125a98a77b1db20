"""Sparse codes of a batch: for each row the values of its few active concepts and which concepts they are.

State: none. Memory: 12 bytes per stored entry in float32, against 4 C per row for dense codes; of 16,384 concepts
with 32 active, 170 times less. An entry of value 0 is inert wherever it stands: rows with fewer active concepts than
the longest are padded with value 0 at index 0. The same index may stand twice in a row: its values add up.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from effml_shared.errors import ConfigError

__all__ = ["SparseCodes"]

Shape = tuple[int, int]


class SparseCodes(NamedTuple):
    """Values and indices of the active concepts of each row.

    Fields:
        values: (..., k) floating; 0 where nothing is stored.
        indices: (..., k) int64 in [0, n_concepts).
        n_concepts: number of concepts, C.

    >>> codes = SparseCodes(torch.tensor([[3.0, 0.0], [4.0, 2.0]]), torch.tensor([[0, 0], [2, 1]]), 3)
    >>> codes.dense()
    tensor([[3., 0., 0.],
            [0., 2., 4.]])
    """

    values: torch.Tensor
    indices: torch.Tensor
    n_concepts: int

    def dense(self) -> torch.Tensor:
        """Return the codes as a dense (..., C) tensor, through which the gradient of `values` flows."""
        empty = self.values.new_zeros(*self.values.shape[:-1], self.n_concepts)
        return empty.scatter_add(-1, self.indices, self.values)

    def to_coo(self) -> torch.Tensor:
        """Return the codes as a coalesced sparse COO tensor (rows, C), rows being all leading dimensions flattened.

        Entries of value 0 are not stored.
        """
        flat = self.reshape((math.prod(self.values.shape[:-1]),))
        rows, places = flat.values.detach().nonzero(as_tuple=True)
        where = torch.stack([rows, flat.indices[rows, places]])
        shape = (len(flat.values), self.n_concepts)
        return torch.sparse_coo_tensor(where, flat.values[rows, places], shape, check_invariants=True).coalesce()

    def detach(self) -> SparseCodes:
        """Return the same codes cut off from the graph."""
        return SparseCodes(self.values.detach(), self.indices, self.n_concepts)

    @classmethod
    def from_entries(cls, rows: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, shape: Shape) -> SparseCodes:
        """Collect single entries, sorted by row, as codes of `shape` = (rows, concepts); k is the longest row's count.

        Args:
            rows, indices: (entries,) int64.
            values: (entries,), whose gradient flows through the codes.
        """
        n_rows, n_concepts = shape
        counts = torch.bincount(rows, minlength=n_rows)
        width = int(counts.max()) if n_rows else 0
        place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        where = (rows, place)
        packed = indices.new_zeros(n_rows, width).index_put(where, indices)
        return cls(values.new_zeros(n_rows, width).index_put(where, values), packed, n_concepts)

    @classmethod
    def from_dense(cls, codes: torch.Tensor) -> SparseCodes:
        """Collect the non-zero entries of dense codes (..., C), of either sign; k is the longest row's count.

        Raises:
            ConfigError: `codes` has no concept dimension.
        """
        if codes.ndim == 0:
            raise ConfigError("codes: got a 0-d tensor, expected (..., n_concepts)")
        flat = codes.reshape(math.prod(codes.shape[:-1]), codes.shape[-1])
        rows, indices = flat.detach().nonzero(as_tuple=True)
        packed = cls.from_entries(rows, indices, flat[rows, indices], (len(flat), flat.shape[1]))
        return packed.reshape(codes.shape[:-1])

    def reshape(self, leading: tuple[int, ...]) -> SparseCodes:
        """Return the same codes with other leading dimensions."""
        shape = (*leading, self.values.shape[-1])
        return SparseCodes(self.values.reshape(shape), self.indices.reshape(shape), self.n_concepts)
