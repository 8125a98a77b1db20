"""What embeddings must be before a dictionary is learnt from them: finite rows that are not zero, one width, pairs.

One pass over the rows, a block at a time, so that memory-mapped files never exist in memory as a whole: 3 N d
operations, and N d numbers read.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from effml_shared.errors import ConfigError
from effml_shared.tensors import widen
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["check_embeddings", "match_pairs"]

_BLOCK = 1 << 16  # rows looked at together


def check_embeddings(
    x: Tensor, *, dim: int | None = None, name: str = "embeddings", warn_of_constants: bool = True
) -> None:
    """Check rows (N, d); columns that hold one value in all of several rows are only warned of.

    Args:
        x: of a floating type; a view of a file is read once.
        dim: the d that is expected; None: any.
        name: what the message calls them, such as the path of their file.
        warn_of_constants: False for a small part of the rows.

    Raises:
        ConfigError: x is no matrix with rows, has another width, or a row holds NaN or infinity or nothing but zeros.

    >>> check_embeddings(torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    Traceback (most recent call last):
    ...
    effml_shared.errors.ConfigError: embeddings: got 1 of 2 rows that are zero (first: 1), expected vectors with a norm
    """
    shape = tuple(x.shape)
    if x.ndim != 2 or not x.is_floating_point() or 0 in shape:
        raise ConfigError(f"{name}: got shape {shape} of {x.dtype}, expected (N, d) of a floating type, N, d >= 1")
    if dim is not None and shape[1] != dim:
        raise ConfigError(f"{name}: got {shape[1]} dimensions, expected {dim}")
    first = widen(x[0])
    broken, zero, constant = [], [], torch.ones_like(first, dtype=torch.bool)
    for start in range(0, len(x), _BLOCK):
        rows = widen(x[start : start + _BLOCK])
        broken.append(start + (~rows.isfinite().all(1)).nonzero()[:, 0])
        zero.append(start + (rows == 0).all(1).nonzero()[:, 0])
        constant &= (rows == first).all(0)
    for places, what, expected in (
        (broken, "hold NaN or infinity", "finite ones"),
        (zero, "are zero", "vectors with a norm"),
    ):
        bad = torch.cat(places)
        if len(bad):
            counted = f"{len(bad)} of {len(x)} rows that {what} (first: {int(bad[0])})"
            raise ConfigError(f"{name}: got {counted}, expected {expected}")
    if warn_of_constants and len(x) > 1 and bool(constant.any()):
        columns = constant.nonzero()[:, 0].tolist()
        some = ", ".join(map(str, columns[:5])) + (", ..." if len(columns) > 5 else "")
        warnings.warn(f"{name}: {len(columns)} of {shape[1]} columns are constant ({some})", stacklevel=2)


def match_pairs(
    first: NDArray[np.int64], second: NDArray[np.int64], *, names: tuple[str, str] = ("first", "second")
) -> NDArray[np.int64]:
    """Return, for each row of the second set, the row of the first that has its pair number.

    Several rows of the second may belong to one of the first, as captions do to an image.

    Raises:
        ConfigError: a number is twice in the first set, or is in one of the sets only.

    >>> match_pairs(np.array([7, 5]), np.array([5, 7, 7])).tolist()
    [1, 0, 0]
    """
    order = np.argsort(first, kind="stable")
    numbers = first[order]
    twice = numbers[1:][numbers[1:] == numbers[:-1]]
    if len(twice):
        raise ConfigError(f"pairs: got number {twice[0]} twice in {names[0]}, expected each once")
    for ids, others, here, there in ((second, first, names[1], names[0]), (first, second, names[0], names[1])):
        alone = ids[~np.isin(ids, others)]
        if len(alone):
            counted = f"{len(alone)} of {len(ids)} rows of {here} without a partner in {there}"
            raise ConfigError(f"pairs: got {counted} (first: number {alone[0]}), expected one for each")
    matched: Any = order[np.searchsorted(numbers, second)]
    return matched
