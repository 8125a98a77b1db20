from __future__ import annotations

import gzip
import json
import os
import random
import sys
import sysconfig
import time
import types
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest
from effml_shared.data import DataConfig, read_documents
from effml_shared.errors import ConfigError, DataError, MissingExtra
from hypothesis import given
from hypothesis import strategies as st


def read(corpus: object, split: Literal["all", "train", "held_out"] = "all", **fields: Any) -> list[str]:
    return list(read_documents(DataConfig(corpus=str(corpus), **fields), split))


def failure(corpus: object, split: Literal["all", "train", "held_out"] = "all", **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(corpus, split, **fields)
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)
    return str(caught.value)


# --- stdlib


def test_stdlib_is_this_interpreters_sources_without_its_tests() -> None:
    documents = read("stdlib")
    assert sum(map(len, documents)) > 5e6
    assert max(map(len, documents)) <= 1 << 16
    text = "".join(documents)
    argparse = Path(sysconfig.get_path("stdlib"), "argparse.py").read_text(encoding="utf-8")
    assert argparse in text
    assert "class CAPITest(" not in text
    assert documents == read("stdlib")


@pytest.mark.parametrize("root", ["python311.zip", "empty"])
def test_a_zipped_or_stripped_stdlib_names_the_alternatives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "python311.zip").write_bytes(b"PK")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / root))
    assert "a file, folder or glob of text" in failure("stdlib")


def test_stdlib_reads_declared_encodings_and_skips_what_is_broken_on_purpose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9t\xe9\n")
    (tmp_path / "b.py").write_bytes(b"# -*- coding: nonsense -*-\n")
    (tmp_path / "c.py").write_bytes(b"x = '\xff'\n")
    (tmp_path / "d.py").write_bytes(b"\xef\xbb\xbfd = 1\n")
    for folder in ("test", "site-packages", "json"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.py").write_text(f"# {folder}\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert read("stdlib") == ["# -*- coding: latin-1 -*-\n# été\n", "d = 1\n", "# json\n"]


# --- files, folders and globs


def test_a_folder_is_read_in_the_order_of_its_names_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.md", "a.weird", "sub/c.txt", ".git/config", ".hidden", "sub/blank"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name if "blank" not in name else " \n")
    (tmp_path / "loop").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # reading it would never return
    assert read(tmp_path) == ["a.weird", "b.md", "sub/c.txt"]
    assert read(tmp_path / "**/*.txt") == ["sub/c.txt"]
    assert read(tmp_path / "*.m?") == ["b.md"]


def test_a_run_directory_in_a_folder_is_no_part_of_the_corpus(tmp_path: Path) -> None:
    for name in ("a.txt", "runs/1/config.yaml", "runs/1/manifest.json", "runs/1/summary.json", "runs/1/plots/a.svg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == ["a.txt"]
    with pytest.raises(DataError, match="without files"):
        read(tmp_path / "runs")


def test_rows_of_every_kind_of_file(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = ["first", "zweites ü", "third\r\nline"]
    lines = "\n\n".join(json.dumps({"body": text, "n": 1}) for text in texts)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    parquet.write_table(arrow.table({"n": [1, 2, 3], "body": texts}), tmp_path / "c.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert read(path, text_field="body") == texts, path
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress("ä".encode()))
    assert read(tmp_path / "d.txt.gz") == ["ä"]
    assert read(tmp_path, text_field="body") == [*texts * 3, "ä"]


def test_a_lone_surrogate_in_json_becomes_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}')
    assert read(tmp_path) == ["a?b"]


@pytest.mark.parametrize("line", ["word " * 20 + "\r\n", "ü" * 70_001, "é\n"], ids=["lines", "one line", "short lines"])
def test_a_big_file_is_cut_at_line_ends_without_losing_a_character(tmp_path: Path, line: str) -> None:
    text = "\ufeff" + line * (200_000 // len(line)) + "the end"
    (tmp_path / "a.txt").write_bytes(text.encode())
    documents = read(tmp_path)
    assert "".join(documents) == text[1:]
    assert all(len(document) <= 1 << 16 for document in documents)
    if "\n" in line:
        assert all(document.endswith("\n") and len(document) >= 1 << 14 for document in documents[:-1])
        assert len(documents) > 8
    (tmp_path / "a.txt").write_bytes(text[: 1 << 16].encode())
    assert len(read(tmp_path)) == 1


# --- the split


@given(st.lists(st.text(alphabet="abc ", min_size=1), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_the_side_of_a_document_depends_on_its_text_alone(texts: list[str], shuffler: random.Random) -> None:
    def sides(order: list[str]) -> tuple[set[str], set[str]]:
        found = []
        for split in ("train", "held_out"):
            try:
                found.append(set(read_documents(config, split)))
            except DataError:
                found.append(set())
        return found[0], found[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effml_shared.data.corpora._read_stdlib", lambda: iter(texts))
        config = DataConfig(held_out=0.4)
        train, held_out = sides(texts)
        assert not train & held_out
        assert train | held_out == {text for text in texts if text.strip()}
        shuffler.shuffle(texts)
        assert sides(texts) == (train, held_out)
        config = DataConfig(held_out=0.6)
        assert sides(texts)[1] >= held_out  # a larger share keeps what was held out


def test_the_held_out_share_of_real_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(4000)))
    assert 0.04 < len(read(tmp_path, "held_out")) / 4000 < 0.06
    assert len(read(tmp_path, "train")) + len(read(tmp_path, "held_out")) == 4000
    assert read(tmp_path, max_bytes=21) == ["document 0", "document 1", "document 2"]
    assert len(read(tmp_path, max_bytes=1)) == 1
    assert "no held_out document among 10 bytes" in failure(tmp_path, "held_out", max_bytes=1)


# --- what is wrong with a corpus


def test_a_missing_path_suggests_the_nearest_names(tmp_path: Path) -> None:
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "shakespeare.txt").write_text("To be")
    assert "(nearest: shakespeare.txt)" in failure(tmp_path / "corpora/shakespear.txt")
    assert "(nearest: corpora)" in failure(tmp_path / "corpra" / "deeper" / "x.txt")
    assert "no 'x'" in failure(tmp_path / "corpora/shakespeare.txt/x")
    assert "(nearest: stdlib)" in failure("sdtlib")


@pytest.mark.parametrize("corpus", ["", " ", "a\0b", "x" * 5000, "~nobody-here/x", "no/such/file/*.txt", "[", "*"])
def test_hostile_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corpus: str) -> None:
    monkeypatch.chdir(tmp_path)
    failure(corpus)


def test_empty_places(tmp_path: Path) -> None:
    assert "without files" in failure(tmp_path)
    assert "without files" in failure(tmp_path / "*.txt")
    (tmp_path / "a.txt").write_text("")
    assert "no text" in failure(tmp_path)
    assert "no text" in failure(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text(" \n\t")
    assert "no text" in failure(tmp_path / "a.txt")


@pytest.mark.parametrize("offset", [0, 3, 5000, 70_000, 150_001])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".txt.gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
def test_a_byte_that_is_not_utf8_is_located(tmp_path: Path, offset: int, suffix: str, mark: bytes) -> None:
    line = b" " * 79 + b"\n" if suffix == ".jsonl" else b"x\xc3\xa9" * 33 + b"\n"
    text = line * 2000
    data = mark + text[:offset] + b"\xff" + text[offset + 1 :]
    with pytest.raises(UnicodeDecodeError) as expected:  # inside a character, Python blames its first byte
        data.decode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    assert f"{path}: got a byte that is not UTF-8 at offset {expected.value.start}," in failure(tmp_path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "x"', "expected one JSON object per line"),
        ("[" * 100_000, "expected one JSON object per line"),
        ('{"n": ' + "9" * 5000 + "}", "expected one JSON object per line"),
        ("[1]", "got list, expected a str in the field 'text'"),
        ("null", "got NoneType"),
        ('{"title": "x", "id": 3}', "got {'title': 'str', 'id': 'int'}, expected a str in the field 'text'"),
        ('{"text": null}', "got {'text': 'NoneType'}"),
        ('{"text": ["x"]}', "got {'text': 'list'}"),
        ("{}", "got {}"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    message = failure(path)
    assert message.startswith(f"{path}:3: ")
    assert expected in message


def test_damaged_archives_and_tables(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = tmp_path / "a.parquet"
    parquet.write_table(arrow.table({"body": ["some text"] * 100, "n": range(100)}), table)
    assert "got {'body': 'str', 'n': 'int'}, expected a str in the field 'text'" in failure(table)
    archive = tmp_path / "a.txt.gz"
    archive.write_bytes(gzip.compress(random.Random(0).randbytes(100).hex().encode()))
    for path in (table, archive):
        whole = path.read_bytes()
        for length in range(0, len(whole) - 1, 23):
            path.write_bytes(whole[:length])
            failure(path, text_field="body")
        shuffler = random.Random(0)
        for _ in range(150):  # a flipped byte may go unnoticed, but is never a traceback
            damaged = bytearray(whole)
            damaged[shuffler.randrange(len(whole))] ^= 1 << shuffler.randrange(8)
            path.write_bytes(damaged)
            with suppress(DataError):
                read(path, text_field="body")
    (tmp_path / "b.parquet").write_text("not a table")
    assert "expected a readable, whole .parquet file" in failure(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seq_len": -3}, "seq_len: got -3, expected an integer >= 2"),
        ({"max_bytes": 0}, "max_bytes: got 0, expected an integer >= 1"),
        ({"shuffle_buffer": 0}, "shuffle_buffer: got 0, expected an integer >= 1"),
        ({"held_out": 0.0}, "held_out: got 0.0, expected a number between 0 and 1"),
        ({"held_out": float("nan")}, "held_out: got nan, expected a number between 0 and 1"),
    ],
)
def test_the_configuration_is_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig(**fields)


def test_the_configuration_goes_through_omegaconf() -> None:
    omegaconf = pytest.importorskip("omegaconf")
    schema = omegaconf.OmegaConf.structured(DataConfig)
    schema.max_bytes = 10
    assert omegaconf.OmegaConf.to_object(schema) == DataConfig(max_bytes=10)


# --- the hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """Put a hub in the place of the libraries: `calls` records what is asked of it, `rows` is what it holds."""
    fake = types.SimpleNamespace(calls=[], rows=[{"text": "one"}, {"text": "two"}])

    def load_dataset(name: str, subset: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        fake.calls.append((name, subset, split, streaming))
        return iter(fake.rows)

    api = types.SimpleNamespace(dataset_info=lambda name, timeout: fake.calls.append((name, timeout)))
    fake.constants = types.SimpleNamespace(HF_HUB_OFFLINE=False)
    fake.HfApi = lambda: api
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


def test_hub_names(hub: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read("org/name.v2") == ["one", "two"]
    assert read("hub:plain:config-1", streaming=True) == ["one", "two"]
    assert hub.calls == [
        ("org/name.v2", 10),
        ("org/name.v2", None, "train", False),
        ("plain", 10),
        ("plain", "config-1", "train", True),
    ]
    (tmp_path / "org").mkdir()  # now the name is a path that is missing
    assert "no 'name.v2' in" in failure("org/name.v2")
    assert read("hub:org/name.v2") == ["one", "two"]


def test_hub_rows_without_text(hub: types.SimpleNamespace) -> None:
    hub.rows[1] = {"content": "two"}
    assert failure("org/name").startswith("org/name row 1: got {'content': 'str'}, expected a str in the field 'text'")


def test_offline_mode_asks_nobody(hub: types.SimpleNamespace) -> None:
    hub.constants.HF_HUB_OFFLINE = True
    assert read("org/name") == ["one", "two"]
    assert hub.calls == [("org/name", None, "train", False)]


def test_an_unreachable_hub_is_one_quick_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    message = failure("org/name")
    assert time.monotonic() - start < 5
    assert "'stdlib' or a file, folder or glob of text" in message
    assert "HF_HUB_OFFLINE=1" in message


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"pip install 'effml-shared\[data\]'"):
        read("org/name")
