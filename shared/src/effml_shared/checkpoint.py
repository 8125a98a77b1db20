"""Checkpoints: a directory appears whole or not at all, is checked by its sums, and the newest valid one wins.

    checkpoints/step-00000120/manifest.json        format version, step, world size, size and sha256 of every file
                              state.safetensors    the state tree (see `tree`); rank 0 writes it
                              rank-00000.safetensors   what each rank keeps for itself (random state)
                              shards/              only for sharded tensors: torch.distributed.checkpoint, safetensors

A save writes into a hidden neighbour, flushes it to disk and renames it: a kill at any instant leaves either the old
set of checkpoints or the new one. Saving costs one copy of the state to disk and one sha256 pass over it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from effml_shared import distributed
from effml_shared.errors import CheckpointError
from effml_shared.files import flush
from effml_shared.tree import flatten, read_tensors, read_tree, unflatten, write_tensors, write_tree

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["FORMAT", "Checkpoint", "Checkpoints"]

FORMAT = 1
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """What was loaded: the step, the state tree, and this rank's own tree (None on another world size)."""

    step: int
    state: Any
    rank_state: Any
    path: Path


class Checkpoints:
    """Save, find, verify and prune the checkpoints of one training run.

    All methods are collective: with several processes, every rank calls them together.

    Args:
        directory: holds one `step-XXXXXXXX` directory per checkpoint; made at the first save.
        keep: how many of the newest to keep.
        mesh: the device mesh of a sharded model; its DTensors are then loaded sharded. Without a mesh, sharded
            checkpoints load as whole tensors, so any world size (one process included) can continue.
    """

    def __init__(self, directory: str | Path, *, keep: int = 2, mesh: DeviceMesh | None = None) -> None:
        if keep < 1:
            raise CheckpointError(f"keep: got {keep}, expected an integer >= 1")
        self.directory = Path(directory)
        self.keep = keep
        self.mesh = mesh

    def save(self, step: int, state: Any, rank_state: Any = None) -> Path:
        """Write a checkpoint of `state` (same on every rank, or with DTensors) and of each rank's own `rank_state`.

        Raises:
            CheckpointError: the directory cannot be written (read-only, disk full); older checkpoints are untouched.
        """
        final = self.directory / f"step-{step:08d}"
        partial = self.directory / f".partial-step-{step:08d}"
        with distributed.agreed("saving a checkpoint"), _writing(final, partial):
            if distributed.is_main():
                self._sweep()
                partial.mkdir(parents=True)
        tensors, skeleton = flatten(state)
        sharded = {name: tensor for name, tensor in tensors.items() if distributed.is_sharded(tensor)}
        with distributed.agreed("saving a checkpoint"):
            with _writing(final / "shards", partial):
                distributed.save_sharded(sharded, partial / "shards")
            if distributed.is_main():
                plain = {name: tensor for name, tensor in tensors.items() if name not in sharded}
                with _writing(final / "state.safetensors", partial):
                    write_tensors(partial / "state.safetensors", plain, skeleton)
            mine = f"rank-{distributed.rank():05d}.safetensors"
            with _writing(final / mine, partial):
                write_tree(partial / mine, rank_state)
        with distributed.agreed("saving a checkpoint"), _writing(final, partial):
            if distributed.is_main():
                self._commit(step, partial, final, distributed.describe_sharded(sharded))
        return final

    def load(self) -> Checkpoint | None:
        """Load the newest checkpoint that is whole; None where there is none.

        A damaged one is reported as a warning on the `effml_shared.checkpoint` logger, and the one before it is used.

        Raises:
            CheckpointError: there are checkpoints and every one is damaged.
        """
        with distributed.agreed("loading a checkpoint"):
            step = self._newest_valid() if distributed.is_main() else -1
        step = distributed.from_main(step)
        if step < 0:
            return None
        path = self.directory / f"step-{step:08d}"
        manifest = json.loads((path / "manifest.json").read_text())
        tensors, skeleton = read_tensors(path / "state.safetensors")
        tensors |= distributed.load_sharded(manifest["sharded"], path / "shards", self.mesh)
        mine = path / f"rank-{distributed.rank():05d}.safetensors"
        rank_state = read_tree(mine) if manifest["world_size"] == distributed.world_size() else None
        return Checkpoint(step, unflatten(skeleton, tensors), rank_state, path)

    def remove(self) -> None:
        """Delete the directory with every checkpoint in it."""
        if distributed.is_main() and self.directory.exists():
            shutil.rmtree(self.directory)

    def _commit(self, step: int, partial: Path, final: Path, sharded: dict[str, Any]) -> None:
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        listing = {str(path.relative_to(partial)): [path.stat().st_size, _sha256(path)] for path in files}
        manifest = {"format": FORMAT, "step": step, "world_size": distributed.world_size(), "torch": torch.__version__}
        text = json.dumps({**manifest, "files": listing, "sharded": sharded}, indent=1)
        with _writing(final / "manifest.json", partial):
            (partial / "manifest.json").write_text(text)
        for path in [*files, partial / "manifest.json", partial]:
            with _writing(final / path.relative_to(partial), partial):
                flush(path)
        if final.exists():  # a run that went back past a damaged checkpoint reaches its step again
            final.rename(self.directory / f".stale-{final.name}")
        partial.rename(final)
        flush(self.directory)
        for old in self._steps()[self.keep :]:
            path = self.directory / f"step-{old:08d}"
            path.rename(self.directory / f".stale-{path.name}")  # so that no half-deleted directory is ever found
        self._sweep()

    def _sweep(self) -> None:
        for leftover in [*self.directory.glob(".partial-*"), *self.directory.glob(".stale-*")]:
            shutil.rmtree(leftover)

    def _steps(self) -> list[int]:
        """Return the steps of all checkpoints, newest first."""
        names = [path.name for path in self.directory.glob("step-*") if path.name[5:].isdigit()]
        return sorted((int(name[5:]) for name in names), reverse=True)

    def _newest_valid(self) -> int:
        damaged: list[str] = []
        for step in self._steps():
            problem = _problem(self.directory / f"step-{step:08d}")
            if problem is None:
                return step
            damaged.append(f"{self.directory / f'step-{step:08d}'}: {problem}")
            _log.warning("damaged checkpoint %s; trying the one before it", damaged[-1])
        if damaged:
            raise CheckpointError(f"no checkpoint in {self.directory} is whole; newest: {damaged[0]}")
        return -1


def _problem(path: Path) -> str | None:
    """Say what is wrong with a checkpoint directory, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] > FORMAT:
            return f"format {manifest['format']} is newer than this effml reads ({FORMAT}): upgrade effml-shared"
        for name, (size, digest) in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, expected {size}"
            if _sha256(file) != digest:
                return f"{name} does not match its checksum"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read ({error})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _writing(path: Path, partial: Path) -> Iterator[None]:
    """Turn what the operating system refuses into one line that names the file and the way out; drop what is there."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"cannot save to {path}: {reason}; free space or choose another --out") from None
