"""Documents of real text from this machine or the Hugging Face hub, and a held-out part that no order can change.

A document is a JSONL line, a Parquet or hub row, or a text file. A text file of more than 64 Ki characters becomes
passages, so that one big file has a held-out part too: each ends at the first line end after 16 Ki characters, or at
64 Ki where there is none. Blank documents are skipped. A document is held out if the first 8 bytes of its SHA-256,
read as a fraction, are below `held_out`: the same text is on the same side in every run, order and corpus.
"""

from __future__ import annotations

import difflib
import glob
import gzip
import hashlib
import json
import os
import re
import sysconfig
import tokenize
import zlib
from collections.abc import Container, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal, TextIO

from effml_shared.errors import ConfigError, DataError, require

__all__ = ["DataConfig", "read_documents"]

WHOLE, PASSAGE = 1 << 16, 1 << 14
LOCAL = "'stdlib' or a file, folder or glob of text, .jsonl or .parquet"
EXTRA = "effml-shared[data]"
RUN_DIRECTORY = {"config.yaml", "manifest.json", "summary.json"}


@dataclass
class DataConfig:
    """Say what text to read and how to serve it."""

    # "stdlib": the sources of the running interpreter, tests aside. A file, folder (hidden names and run directories
    # aside) or glob of text, .jsonl or .parquet, or .gz. "org/name" where no folder "org" is, or "hub:name[:config]":
    # a train split.
    corpus: str = "stdlib"
    tokenizer: str = "byte"  # or the path of a tokenizer.json
    eos_token: str | None = None  # what ends a document there, if its name is unusual
    seq_len: int = 256  # tokens per sample, of which all but the first are predicted
    held_out: float = 0.05  # share of the documents that is never trained on
    text_field: str = "text"  # where rows keep their text
    max_bytes: int | None = None  # stop reading the corpus, both parts together, after this much text
    streaming: bool = False  # tokenise while training; the held-out part is then of the first 64 MiB
    shuffle_buffer: int = 1024  # windows among which streaming shuffles
    seed: int = 0  # of the order

    def __post_init__(self) -> None:
        for name, least in (("seq_len", 2), ("shuffle_buffer", 1), ("max_bytes", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"{name}: got {value!r}, expected an integer >= {least}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out: got {self.held_out!r}, expected a number between 0 and 1, both excluded")


def read_documents(config: DataConfig, split: Literal["all", "train", "held_out"] = "all") -> Iterator[str]:
    """Yield the documents of one split of `config.corpus`, always in the same order.

    Raises:
        DataError: the corpus is missing, damaged or not UTF-8, or the split is empty.
    """
    corpus, size, taken = config.corpus, 0, 0
    org = re.fullmatch(r"([\w-][\w.-]*)/[\w.-]+", corpus)
    if corpus == "stdlib":
        texts = _read_stdlib()
    elif corpus.startswith("hub:") or (org and not os.path.exists(org[1])):
        texts = _read_hub(corpus, config.text_field, config.streaming)
    else:
        texts = (text for path in _find(corpus) for text in _read_file(path, config.text_field))
    for text in texts:
        data = text.encode(errors="replace")  # JSON can hold lone surrogates, which are no text
        if data.isspace() or not data:
            continue
        size += len(data)
        below = int.from_bytes(hashlib.sha256(data).digest()[:8]) < config.held_out * 2**64
        if split == "all" or below == (split == "held_out"):
            taken += 1
            yield data.decode()
        if config.max_bytes and size >= config.max_bytes:
            break
    if not taken:
        got = f"no {split} document among {size} bytes" if size else "no text"
        raise DataError(f"corpus {corpus!r}: got {got}, expected some: use more text or another share held_out")


def _read_stdlib() -> Iterator[str]:
    root = sysconfig.get_path("stdlib")
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    paths = [path for path in _walk(root, skip) if path.suffix == ".py"]
    if not paths:
        raise DataError(f"corpus 'stdlib': got no .py files in {root} (a zipped or stripped Python), expected {LOCAL}")
    for path in paths:
        with suppress(SyntaxError, UnicodeDecodeError), tokenize.open(path) as handle:  # some are broken on purpose
            yield from _cut(handle)


def _read_hub(corpus: str, field: str, streaming: bool) -> Iterator[str]:
    name, _, subset = corpus.removeprefix("hub:").partition(":")
    datasets = require("datasets", extra=EXTRA, purpose="to read from the Hugging Face hub")
    hub = require("huggingface_hub", extra=EXTRA, purpose="to reach the Hugging Face hub")
    try:
        if not hub.constants.HF_HUB_OFFLINE:
            hub.HfApi().dataset_info(name, timeout=10)  # ask once: load_dataset alone retries for half a minute
        rows = datasets.load_dataset(name, subset or None, split="train", streaming=streaming)
        yield from (_text(row, field, f"{corpus} row {number}") for number, row in enumerate(rows))
    except DataError:
        raise
    except Exception as error:  # each release of the hub's client and of its transport has other classes
        got = f"no local path, and from the Hugging Face hub {type(error).__name__}: {error}".partition("\n")[0]
        use = f"{LOCAL}, or HF_HUB_OFFLINE=1 for a dataset already in the cache"
        raise DataError(f"corpus {corpus!r}: got {got}; expected {use}") from error


def _read_file(path: Path, field: str) -> Iterator[str]:
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            parquet = require("pyarrow.parquet", extra=EXTRA, purpose="to read Parquet files")
            with parquet.ParquetFile(path) as table:
                columns = [field] if field in table.schema_arrow.names else None  # None: all, for the error to name
                for batch in table.iter_batches(columns=columns):
                    yield from (_text(row, field, path) for row in batch.to_pylist())
            return
        with (
            (open if name == path.name else gzip.open)(path, "rb") as raw,
            TextIOWrapper(raw, encoding="utf-8-sig", newline="\n") as handle,
        ):
            try:
                yield from _read_jsonl(handle, field, path) if name.endswith(".jsonl") else _cut(handle)
            except UnicodeDecodeError as error:
                at = raw.tell() - len(error.object) + error.start
                use = "convert it, or leave it out with a glob such as '**/*.txt'"
                raise DataError(f"{path}: got a byte that is not UTF-8 at offset {at}, expected UTF-8: {use}") from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{path}: got {reason}, expected a readable, whole {path.suffix or 'text'} file") from error


def _read_jsonl(handle: TextIO, field: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(handle, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: got {error}, expected one JSON object per line") from None
            yield _text(row, field, f"{path}:{number}")


def _text(row: Any, field: str, where: object) -> str:
    if isinstance(row, dict) and isinstance(text := row.get(field), str):
        return text
    got = {name: type(value).__name__ for name, value in row.items()} if isinstance(row, dict) else type(row).__name__
    raise DataError(f"{where}: got {got}, expected a str in the field {field!r}, which text_field names")


def _cut(handle: TextIO) -> Iterator[str]:
    text = handle.read(WHOLE + 1)
    if len(text) <= WHOLE:
        yield text
        return
    handle.seek(0)
    while text := handle.read(PASSAGE) + handle.readline(WHOLE - PASSAGE):
        yield text


def _find(corpus: str) -> list[Path]:
    path = os.path.expanduser(corpus)
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        found = list(_walk(path))
    elif glob.has_magic(path):
        matches = filter(os.path.isfile, glob.glob(path, recursive=True))
        found = sorted({Path(name).resolve() for name in matches})  # `**` follows links: each file once
    else:
        missing = Path(path).absolute()
        while not os.path.exists(missing.parent):
            missing = missing.parent
        near = difflib.get_close_matches(missing.name, ["stdlib", *glob.glob("*", root_dir=missing.parent)])
        hint = f" (nearest: {', '.join(near)})" if near else ""
        raise DataError(f"corpus {corpus!r}: got no {missing.name!r} in {missing.parent}{hint}, expected {LOCAL}")
    if not found:
        raise DataError(f"corpus {corpus!r}: got a folder or glob without files, expected {LOCAL}")
    return found


def _walk(root: str, skip: Container[str] = ()) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        if set(names) >= RUN_DIRECTORY:  # text that changes while it is trained on
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skip)
        paths = (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        yield from (path for path in paths if path.is_file())
