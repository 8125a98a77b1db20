"""Codes as the metrics read them: dense or sparse, checked once, as the list of their non-zero entries or decoded.

A concept is *active* in a row where its code is not 0; for non-negative codes that is where it is above 0. Values are
widened to float32 at least, so that half precision is only a way to store codes. Cost: one pass over what is stored
and, for sparse codes, a sort of it, because one concept may stand twice in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from effml_shared.errors import ConfigError
from effml_shared.tensors import widen
from torch import Tensor

from effml_eval.sae.sparse_codes import SparseCodes
from effml_eval.sae.sparse_products import weighted_sums

__all__ = [
    "Codes",
    "Entries",
    "add_up",
    "check_codes",
    "check_column",
    "check_matrix",
    "check_pairs",
    "concept_blocks",
    "decode",
    "entries",
    "row_chunks",
    "unit_rows",
]

Codes: TypeAlias = Tensor | SparseCodes
"""(N, C) tensor, or sparse codes with values and indices (N, k)."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BLOCK = 1 << 22
"""Numbers that a temporary may hold where work is cut in blocks."""


class Entries(NamedTuple):
    """The non-zero entries of codes, by rows and within a row by concepts.

    Fields:
        rows: (entries,) int64.
        concepts: (entries,) int64.
        values: (entries,) float32 or float64.
    """

    rows: Tensor
    concepts: Tensor
    values: Tensor


def check_matrix(name: str, x: Any, *, columns: int | None = None) -> Tensor:
    """Return x, a matrix of finite floating numbers, in float32 or wider.

    Raises:
        ConfigError: it is none, or has another number of columns.
    """
    _check_dense(name, x)
    if x.ndim != 2 or not x.shape[1] or (columns is not None and x.shape[1] != columns):
        expected = "(rows, at least one column)" if columns is None else f"(rows, {columns})"
        raise ConfigError(f"{name}: got shape {tuple(x.shape)}, expected {expected}")
    _check_finite(name, x)
    return widen(x.detach())


def check_column(name: str, x: Any, n_concepts: int | None = None, *, nan: bool = False) -> Tensor:
    """Return x, one number per concept (C), in float64.

    Args:
        nan: allow NaN, where a concept has no such number.

    Raises:
        ConfigError: it is none, has another length, or is not finite.
    """
    _check_dense(name, x)
    if x.ndim != 1 or (n_concepts is not None and len(x) != n_concepts):
        expected = "(concepts,)" if n_concepts is None else f"({n_concepts},), one per concept"
        raise ConfigError(f"{name}: got shape {tuple(x.shape)}, expected {expected}")
    _check_finite(name, x[~x.isnan()] if nan else x)
    return x.detach().double()


def check_codes(name: str, codes: Any, n_concepts: int | None = None) -> int:
    """Return the number of rows of valid codes.

    Raises:
        ConfigError: they are no matrix of finite numbers, an index is out of range, or they have another number of
            concepts.
    """
    if not isinstance(codes, SparseCodes):
        return len(check_matrix(name, codes, columns=n_concepts))
    values, indices = codes.values, codes.indices
    _check_dense(f"{name}.values", values)
    if values.ndim != 2 or values.shape != indices.shape or indices.dtype != torch.int64:
        raise ConfigError(
            f"{name}: got values {tuple(values.shape)} of {values.dtype} and indices {tuple(indices.shape)} of "
            f"{indices.dtype}, expected floating values and int64 indices, both (rows, k)"
        )
    if n_concepts is not None and codes.n_concepts != n_concepts:
        raise ConfigError(f"{name}: got {codes.n_concepts} concepts, expected {n_concepts}")
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < codes.n_concepts:
        raise ConfigError(f"{name}: got an index outside [0, {codes.n_concepts}), expected a concept")
    _check_finite(name, values)
    return len(values)


def check_pairs(image: Any, text: Any) -> int:
    """Return the number of pairs of two sets of codes.

    Raises:
        ConfigError: a set is invalid, or they differ in rows or concepts.
    """
    rows = check_codes("image_codes", image)
    others = check_codes("text_codes", text, n_concepts_of(image))
    if rows != others:
        raise ConfigError(f"text_codes: got {others} rows beside {rows} image codes, expected one per pair")
    return rows


def n_concepts_of(codes: Codes) -> int:
    """Return C."""
    return codes.n_concepts if isinstance(codes, SparseCodes) else codes.shape[1]


def entries(codes: Codes) -> Entries:
    """List the non-zero entries; values of one concept that stands several times in a row are added.

    >>> entries(SparseCodes(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[2, 0, 2]]), 3))
    Entries(rows=tensor([0, 0]), concepts=tensor([0, 2]), values=tensor([2., 4.]))
    """
    if not isinstance(codes, SparseCodes):
        rows, concepts = codes.nonzero(as_tuple=True)
        return Entries(rows, concepts, widen(codes.detach()[rows, concepts]))
    values = widen(codes.values.detach())
    rows, places = values.nonzero(as_tuple=True)
    keys, values = add_up(rows * codes.n_concepts + codes.indices[rows, places], values[rows, places])
    kept = values != 0  # +1 and -1 of one concept cancel
    keys, values = keys[kept], values[kept]
    return Entries(keys // codes.n_concepts, keys % codes.n_concepts, values)


def add_up(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the different keys, rising, and the sum of the values of each."""
    keys, order = keys.sort(stable=True)
    keys, places = keys.unique_consecutive(return_inverse=True)
    return keys, values.new_zeros(len(keys)).index_add_(0, places, values[order])


def concept_blocks(*codes: Codes) -> Iterator[tuple[int, int, list[Entries]]]:
    """Yield (first concept, end, entries of each set with concepts counted from the first), covering all concepts.

    Sparse sets are one block; dense ones are cut so that listing their entries does not multiply their memory.
    """
    n_concepts = n_concepts_of(codes[0])
    numbers = sum(len(z) for z in codes if isinstance(z, Tensor))
    width = n_concepts if not numbers else max(1, BLOCK // numbers)
    listed = {i: entries(z) for i, z in enumerate(codes) if isinstance(z, SparseCodes)}
    for start in range(0, n_concepts, max(width, 1)):
        stop = min(start + width, n_concepts)
        blocks = []
        for i, z in enumerate(codes):
            if isinstance(z, Tensor):
                blocks.append(entries(z[:, start:stop]))
            else:
                kept = (listed[i].concepts >= start) & (listed[i].concepts < stop)
                blocks.append(Entries(*(column[kept] for column in listed[i])))
                blocks[-1].concepts.sub_(start)
        yield start, stop, blocks


def row_chunks(codes: Codes, size: int) -> Iterator[Codes]:
    """Yield the codes of `size` rows at a time."""
    if isinstance(codes, Tensor):
        yield from codes.split(size)
    else:
        for values, indices in zip(codes.values.split(size), codes.indices.split(size), strict=True):
            yield SparseCodes(values, indices, codes.n_concepts)


def decode(codes: Codes, dictionary: Tensor) -> Tensor:
    """Return codes (N, C) times dictionary (C, d), in float32 or wider. FLOPs: 2 N d per stored code."""
    if isinstance(codes, Tensor):
        values = widen(codes.detach())
        dtype = torch.promote_types(values.dtype, dictionary.dtype)
        return values.to(dtype) @ dictionary.to(dtype)
    values = widen(codes.values.detach())
    dtype = torch.promote_types(values.dtype, dictionary.dtype)
    return weighted_sums(values.to(dtype), codes.indices, dictionary.to(dtype))


def unit_rows(name: str, dictionary: Any) -> Tensor:
    """Return atoms (C, d) of norm 1.

    Raises:
        ConfigError: it is no matrix of finite numbers, or an atom is zero and has no direction.
    """
    atoms = check_matrix(name, dictionary)
    atoms = atoms / atoms.abs().amax(1, keepdim=True).clamp(min=torch.finfo(atoms.dtype).tiny)  # tiny squares vanish
    norms = torch.linalg.vector_norm(atoms, dim=1, keepdim=True)
    if bool((norms == 0).any()):
        zeros = (norms[:, 0] == 0).nonzero()[:, 0].tolist()
        raise ConfigError(f"{name}: got {len(zeros)} atoms of norm 0, the first at {zeros[0]}, expected none")
    return atoms / norms


def _check_dense(name: str, x: Any) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS or x.layout != torch.strided:
        got = f"a tensor of {x.dtype}, {x.layout}" if isinstance(x, Tensor) else type(x).__name__
        raise ConfigError(f"{name}: got {got}, expected a dense tensor of float16, bfloat16, float32 or float64")


def _check_finite(name: str, x: Tensor) -> None:
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).sum())
        raise ConfigError(f"{name}: got {bad} of {x.numel()} numbers NaN or infinite, expected finite ones")
