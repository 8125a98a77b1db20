"""Files that are whole at every moment: written beside their place, flushed to disk, then renamed.

A kill at any instant leaves all of the old file or all of the new one, and several processes may write the same file at
once: one of theirs is what stands there in the end. A write that fails leaves nothing; a kill in the middle of one may
leave a hidden `.NAME.*.partial`, which nobody reads. Cost: the bytes to disk once, and two waits for the disk.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from effml_shared.errors import CheckpointError

__all__ = ["flush", "put_in_place", "replacing", "unwritten", "write_whole"]


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file in one motion; text in UTF-8.

    Raises:
        CheckpointError: it cannot be written; the old one is still there, and nothing beside it.
    """
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside a file; what is written there takes the file's place in one motion when the block ends well.

    Raises:
        CheckpointError: the operating system or safetensors refuses what the block does, or the replacement itself; the
            old file is still there, and nothing beside it.
    """
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        yield partial
        put_in_place(partial, path)
    except (OSError, SafetensorError) as error:
        raise unwritten(path, error) from None
    finally:
        with suppress(OSError):  # it has moved to its place; or it cannot even be removed, and the error says why
            partial.unlink()


def put_in_place(partial: Path, path: Path) -> None:
    """Give a file that is complete its name, in place of an older file; on disk when this returns."""
    flush(partial)
    partial.replace(path)
    flush(path.parent)


def flush(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unwritten(path: Path, error: OSError | SafetensorError) -> CheckpointError:
    """Return the one line that names the file, the reason and the way out, to be raised."""
    reason = getattr(error, "strerror", None) or str(error)
    return CheckpointError(f"cannot write {path}: {reason}; free space or choose another place")
