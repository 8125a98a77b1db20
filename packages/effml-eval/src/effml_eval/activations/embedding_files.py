"""Embeddings from a file that something else wrote: .safetensors, .npy or .parquet, as a tensor (N, d).

The first two are memory-mapped: nothing is read until rows are taken, and the operating system keeps what memory
allows. A Parquet column of lists is read as a whole, 1 copy of N d numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from effml_shared.errors import DataError, require
from safetensors import SafetensorError, safe_open
from torch import Tensor

from effml_eval.activations.embedding_checks import check_embeddings

__all__ = ["read_embeddings"]


def read_embeddings(path: str | Path, *, field: str | None = None, dim: int | None = None) -> Tensor:
    """Return the rows of a file (N, d), on the CPU and in the file's own floating type, checked.

    Args:
        path: what it is told by its suffix.
        field: the tensor of a .safetensors file or the column of a .parquet file; None: the only one that fits.
        dim: the d that is expected; None: any.

    Raises:
        DataError: the file is missing, empty, damaged or of another kind, or has no such field.
        ConfigError: see `check_embeddings`.
        MissingExtra: pyarrow is needed and not installed.
    """
    path = Path(path)
    readers = {".safetensors": _read_safetensors, ".npy": _read_npy, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise DataError(f"{path}: got {path.suffix or 'no suffix'}, expected one of {', '.join(readers)}")
    try:
        if not path.stat().st_size:
            raise DataError(f"{path}: got an empty file, expected embeddings")
        x = readers[path.suffix](path, field)
    except (OSError, EOFError, ValueError, SafetensorError) as error:  # pyarrow's errors are ValueErrors
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: got {reason}, expected a readable, whole {path.suffix} file") from None
    check_embeddings(x, dim=dim, name=str(path))
    return x


def _read_npy(path: Path, field: str | None) -> Tensor:
    # Copy on write: torch knows no read-only tensors, and the file stays as it is.
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    if array.dtype not in (np.float16, np.float32, np.float64):
        raise DataError(f"{path}: got {array.dtype}, expected float16, float32 or float64 of this machine's byte order")
    return torch.from_numpy(array if array.flags.c_contiguous else np.ascontiguousarray(array))


def _read_safetensors(path: Path, field: str | None) -> Tensor:
    with safe_open(path, framework="pt") as file:
        names = file.keys()
        return file.get_tensor(
            _choose(path, field, [name for name in names if len(file.get_slice(name).get_shape()) == 2])
        )


def _read_parquet(path: Path, field: str | None) -> Tensor:
    wanted = {"extra": "effml-shared[data]", "purpose": "to read Parquet files"}
    parquet, types = require("pyarrow.parquet", **wanted), require("pyarrow.types", **wanted)
    kinds = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    lists = [column.name for column in parquet.read_schema(path) if any(fits(column.type) for fits in kinds)]
    name = _choose(path, field, lists)
    column: Any = parquet.read_table(path, columns=[name]).column(name).combine_chunks()
    lengths = set(column.value_lengths().to_pylist()) if hasattr(column, "value_lengths") else {column.type.list_size}
    if column.null_count or len(lengths) != 1:
        raise DataError(f"{path}: got lists of lengths {sorted(map(str, lengths))} in {name!r}, expected one length")
    values = column.flatten().to_numpy(zero_copy_only=False)
    if values.dtype.kind != "f":
        raise DataError(f"{path}: got lists of {values.dtype} in {name!r}, expected floating-point numbers")
    return torch.from_numpy(np.array(values).reshape(len(column), -1))


def _choose(path: Path, field: str | None, fitting: list[str]) -> str:
    if field is None and len(fitting) != 1:
        raise DataError(
            f"{path}: got {len(fitting)} fields that may be embeddings, {fitting}, expected one or its name"
        )
    if field is not None and field not in fitting:
        raise DataError(f"{path}: got the fields {fitting} that may be embeddings, expected {field!r} among them")
    return fitting[0] if field is None else field
