"""Puzzles as a Hugging Face `Dataset`, for its trainers and its hub: needs `datasets`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effml_shared.checks import check_count
from effml_shared.errors import ConfigError, require
from torch import Tensor

from effml_diffusion.puzzles.sample_stream import SampleStream, Source

__all__ = ["as_dataset", "sample_dataset"]


def as_dataset(columns: Mapping[str, Tensor]) -> Any:
    """Return a `datasets.Dataset` with one row per entry of the tensors (rows, ...), such as `Puzzles._asdict()`.

    Raises:
        ConfigError: the columns have different numbers of rows.
        MissingExtra: `datasets` is not installed.
    """
    rows = {name: len(column) for name, column in columns.items()}
    if len(set(rows.values())) != 1:
        raise ConfigError(f"columns: got {rows} rows, expected one or more columns with as many rows each")
    datasets = require("datasets", extra="effml-shared[data]", purpose="to make a Dataset")
    return datasets.Dataset.from_dict({name: column.tolist() for name, column in columns.items()})


def sample_dataset(source: Source, count: int, *, seed: int = 0) -> Any:
    """Return the first `count` samples of a source as a `datasets.Dataset`.

    Raises:
        MissingExtra: `datasets` is not installed.
    """
    check_count("count", count, 1)
    return as_dataset(SampleStream(source, seed=seed).next(count))
