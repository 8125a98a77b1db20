"""Keep on disk what takes long to make: one safetensors file per request, named by what was asked for.

`$XDG_CACHE_HOME/effml/puzzles`, else `~/.cache/effml/puzzles`, or any directory. A file appears whole or not at all: it
is written beside its place, flushed and renamed, so that a kill leaves nothing half-written and several processes may
make the same thing at once. A file that cannot be read, or was made for another request, is reported on this module's
logger and made anew; a place that cannot be written is reported, and what was made is returned all the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from effml_shared.errors import CheckpointError
from effml_shared.files import replacing
from effml_shared.tree import read_tensors, write_tensors
from torch import Tensor

__all__ = ["Archive"]

FORMAT = 1
"""To be raised whenever a generator gives something else for the same parameters."""

_log = logging.getLogger(__name__)


class Archive:
    """Tensors by name and parameters.

    directory: None for the user's cache directory. It is made when something is kept.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.directory = (Path(home) / "effml" / "puzzles" if directory is None else Path(directory)).expanduser()

    def get(
        self, name: str, parameters: Mapping[str, int | float | str | None], make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return what `make` makes for these parameters, from disk if it was made before.

        Args:
            name: what it is, as a part of a file name.
        """
        request = {"format": FORMAT, "name": name, "parameters": dict(parameters)}
        digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]
        path = self.directory / f"{name}-{digest}.safetensors"
        found = _read(path, request)
        if found is None:
            found = make()
            try:
                with replacing(path) as partial:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_tensors(partial, found, request)
            except CheckpointError as error:
                _log.warning("what was made cannot be kept, so it will be made again next time: %s", error)
        return found


def _read(path: Path, request: object) -> dict[str, Tensor] | None:
    if not path.exists():
        return None
    try:
        tensors, asked = read_tensors(path)
    except (CheckpointError, ValueError, KeyError) as error:
        _log.warning("made anew, since the kept one is damaged: %s", error)
        return None
    if asked != request:
        _log.warning("made anew, since %s was kept for another request", path)
        return None
    return tensors
