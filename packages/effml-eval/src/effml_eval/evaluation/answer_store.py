"""What a model has answered, kept so that a kill at any instant loses one batch at most.

    answers/rank-00000-0002.jsonl         a shard; with .part behind its name it is being written, or a kill left it

Each line is one answer, found by what determines it: model, engine settings and seed (together the `scope`), the hash
of the request, and the number of the sample. The lines of a batch are written together and flushed to disk before the
next batch. A session never appends to an older shard: whatever a kill left behind is closed, its unfinished line cut
off, and a new shard begun. A damaged line is dropped, and its request asked again; of lines with one key the first
counts. Both are counted for the log of the run, since they change no number.

Names of batches that did not fit into memory are kept too: halved again, they give the same numbers.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from effml_shared.errors import CheckpointError
from effml_shared.files import flush, put_in_place

from effml_eval.scoring.scorer import Generation, RollingScore, Score

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Answer", "AnswerStore", "Key"]

Key = tuple[str, int]  # hash of the request, number of the sample
Answer = Score | RollingScore | Generation

_KINDS: dict[str, Any] = {"score": Score, "rolling": RollingScore, "generate": Generation}
_LONGEST = 100_000  # lines of a shard


class AnswerStore:
    """Answers of one scope: in memory, and in a directory if there is one.

    Args:
        directory: that of the whole evaluation; None: memory only.
        scope: what all answers here depend on; lines of another one are passed over.
        rank: of this process, which writes shards of its own.

    Raises:
        CheckpointError: the directory cannot be read or written.
    """

    def __init__(self, directory: Path | None, scope: str, rank: int = 0) -> None:
        self.scope = scope
        self.answers: dict[Key, Answer] = {}
        self.too_large: set[str] = set()
        self.duplicates = self.damaged = self.unfinished = 0  # lines
        self._folder = None if directory is None else directory / "answers"
        self._stem = f"rank-{rank:05d}-"
        self._file: BinaryIO | None = None
        self._lock: BinaryIO | None = None
        self._lines = 0
        if self._folder is not None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._lock = _lock(self._folder / f"{self._stem}lock")
                self.unfinished = sum(_close(left) for left in self._folder.glob(f"{self._stem}*.part"))
            except OSError as error:
                raise _failure(self._folder, error) from None
            self._read(f"{self._stem}*.jsonl")  # other processes may be at work on theirs

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._close_shard()
        except OSError as error:
            raise _failure(Path(str(self._folder)), error) from None
        finally:
            if self._lock is not None:
                self._lock.close()

    def __contains__(self, key: Key) -> bool:
        return key in self.answers

    def read_all(self) -> None:
        """Take in the shards of all ranks, each of which has closed its own."""
        self.answers, self.duplicates, self.damaged = {}, 0, 0
        self._read("*.jsonl")

    def _read(self, pattern: str) -> None:
        for path in sorted(self._folder.glob(pattern)) if self._folder is not None else ():
            try:
                content = path.read_bytes()
            except OSError as error:
                raise _failure(path, error) from None
            for line in content.split(b"\n"):
                if line:
                    self._take(line)

    def add(self, answers: Mapping[Key, Answer], too_large: Iterable[str] = ()) -> None:
        """Keep the answers of a batch; when this returns they are on disk.

        Args:
            answers: some of them may be known already: then the older ones stay.
            too_large: names of batches that did not fit into memory.

        Raises:
            CheckpointError: the shard cannot be written.
        """
        names = sorted(set(too_large) - self.too_large)
        rows: list[dict[str, Any]] = [{"scope": self.scope, "too_large": names}] if names else []
        for (request, sample), answer in answers.items():
            rows.append({"scope": self.scope, "request": request, "sample": sample, **_encode(answer)})
        self.too_large.update(names)
        self.duplicates += sum(key in self.answers for key in answers)
        for key, answer in answers.items():
            self.answers.setdefault(key, answer)
        if self._folder is not None and rows:
            try:
                self._write(self._folder, "".join(json.dumps(row) + "\n" for row in rows).encode())
                self._lines += len(rows)
                if self._lines >= _LONGEST:
                    self._close_shard()
            except OSError as error:
                raise _failure(self._folder, error) from None

    def _write(self, folder: Path, lines: bytes) -> None:
        if self._file is None:
            names = [path.name.removeprefix(self._stem).partition(".")[0] for path in folder.glob(f"{self._stem}*")]
            number = max((int(name) for name in names if name.isdigit()), default=-1) + 1
            self._file = (folder / f"{self._stem}{number:04d}.jsonl.part").open("xb")
            flush(folder)
        self._file.write(lines)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _close_shard(self) -> None:
        if self._file is not None:
            self._file.close()
            _close(Path(self._file.name))
            self._file, self._lines = None, 0

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            if row["scope"] != self.scope:
                return
            if "too_large" in row:
                self.too_large.update(map(str, row["too_large"]))
                return
            key, answer = (str(row["request"]), int(row["sample"])), _decode(row)
        except (ValueError, TypeError, KeyError, RecursionError):
            self.damaged += 1
            return
        self.duplicates += key in self.answers
        self.answers.setdefault(key, answer)


def _encode(answer: Answer) -> dict[str, Any]:
    kind = next(kind for kind, made in _KINDS.items() if isinstance(answer, made))
    fields: dict[str, Any] = answer._asdict()
    if fields.get("logprob") == -math.inf:
        fields["logprob"] = "-inf"  # which JSON has no number for
    return {"kind": kind, "answer": fields}


def _decode(row: dict[str, Any]) -> Answer:
    fields = dict(row["answer"])
    if "logprob" in fields:
        fields["logprob"] = float(fields["logprob"])
    return _KINDS[row["kind"]](**fields)


def _close(part: Path) -> bool:
    """Take the mark of a shard in work from its name; cut off an unfinished line, and say whether there was one."""
    content = part.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(part, whole)
    put_in_place(part, part.with_suffix(""))
    return whole < len(content)


def _lock(path: Path) -> BinaryIO:
    """Keep other processes from writing here while the file is open; the end of this one, however it comes, unlocks."""
    file = path.open("wb")
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise CheckpointError(f"{path.parent}: another process writes there; wait for it, or end it") from None
        except OSError:  # a file system that knows no locks
            return file
    return file


def _failure(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read or written ({error.strerror}); free space or choose another place")
