"""Rows of local data files: a JSON object per line, or a Parquet table."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from effml_shared.errors import ConfigError, DataError, require

__all__ = ["Row", "RowReader", "get_field", "read_rows"]

Row = Mapping[str, Any]
Record = TypeVar("Record")
RowReader = Callable[[Row, int], Record]


def read_rows(path: str | Path, read: RowReader[Record]) -> list[Record]:
    """Make a record of every row of a .jsonl, .jsonl.gz or .parquet file.

    Raises:
        DataError: the file is missing or damaged.
        ConfigError: `read` refuses a row; names it.
    """
    records = []
    for number, row in enumerate(_rows(Path(path))):
        try:
            records.append(read(row, number))
        except ConfigError as error:
            raise ConfigError(f"{path}, row {number + 1}: {error}") from None
    return records


def get_field(row: Row, name: str) -> Any:
    """Return a field of a row, `a.b` being the field b of the field a.

    Raises:
        ConfigError: there is none of that name; says which there are.

    >>> get_field({"choices": {"text": ["yes", "no"]}}, "choices.text")
    ['yes', 'no']
    """
    value: Any = row
    for part in name.split("."):
        if isinstance(value, list | tuple) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            raise ConfigError(f"field {name}: got a row with {', '.join(map(str, row))!r:.200}, expected that field")
    return value


def _rows(path: Path) -> Iterator[Row]:
    try:
        if path.name.endswith(".parquet"):
            parquet = require("pyarrow.parquet", extra="effml-shared[data]", purpose="to read Parquet files")
            yield from parquet.read_table(path).to_pylist()
            return
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse(line, f"{path}, line {number}")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise DataError(
            f"{path}: got {reason}, expected a readable, whole .jsonl, .jsonl.gz or .parquet file"
        ) from None


def _parse(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: got {str(error)[:80]}, expected one JSON object per line") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: got a {type(row).__name__}, expected one JSON object per line")
    return row
