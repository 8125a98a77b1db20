"""Files that are whole at every moment: written beside, flushed to disk, and renamed."""

from __future__ import annotations

import os
from pathlib import Path

from effml_shared.checkpoint import flush
from effml_shared.errors import CheckpointError

__all__ = ["write_atomic"]


def write_atomic(path: Path, text: str) -> None:
    """Replace a file in one motion.

    Raises:
        CheckpointError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        flush(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror}; free space or choose another place") from None
