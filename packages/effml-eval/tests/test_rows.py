from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from effml_eval.tasks.rows import get_field, read_rows
from effml_shared.errors import ConfigError, DataError

ROWS = [{"text": "é"}, {"text": "b"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def test_formats(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + LINES + b"\n  \n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert read_rows(tmp_path / name, lambda row, number: (number, row["text"])) == [(0, "é"), (1, "b")]


def test_a_parquet_table(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet", lambda row, number: row["text"]) == ["é", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a.jsonl, line 2: got .*, expected one JSON object per line"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', r"a.jsonl, line 2: got a list"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a.jsonl, line 1: got .*decode"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl, line 1: got .*recursion"),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], r"a.jsonl.gz: got .*, expected a readable, whole"),
        ("a.jsonl.gz", LINES, r"a.jsonl.gz: got .*gzip"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as found:
        read_rows(tmp_path / name, lambda row, number: row)
    assert "\n" not in str(found.value)


def test_fields() -> None:
    row = {"a": {"b": [{"c": 1}]}, "d": None}
    assert get_field(row, "a.b.0.c") == 1
    assert get_field(row, "d") is None
    for name in ("x", "a.x", "a.b.1", "a.b.x", "d.e", "a.b.0.c.0"):
        with pytest.raises(ConfigError, match=r"got a row with 'a, d'"):
            get_field(row, name)
