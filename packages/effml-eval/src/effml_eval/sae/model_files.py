"""A model as two files of a directory: `config.json`, which anyone can read, and its tensors as safetensors.

    config.json                     format version, fields of the model, name and sha256 of the file of tensors
    model-0123456789ab.safetensors  the tensors; the digits are the first of the file's sha256

Each file is written beside its place, flushed to disk and renamed, the tensors first: what `config.json` names is
always whole, so a kill at any instant leaves the model that was there before, or the new one. Only then is the old file
of tensors removed. Nothing is ever pickled. Cost: one copy to disk and one sha256 pass over it, at each end.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from effml_shared.errors import CheckpointError
from effml_shared.files import put_in_place, write_whole
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["read_json", "read_model", "read_safetensors", "write_model"]

FORMAT = 1
_CONFIG = "config.json"


def write_model(directory: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a model, in place of one that stands there; other files of the directory are left alone.

    Args:
        fields: plain values.
        tensors: on any device; those that share memory are stored each on its own.

    Raises:
        CheckpointError: the directory cannot be written.
    """
    plain = {name: tensor.detach().contiguous().cpu().clone() for name, tensor in tensors.items()}
    old = _weights_of(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _partial(directory / ".model.partial") as partial:
            save_file(plain, partial, {"format": "pt"})
            digest = _sha256(partial)
            weights = directory / f"model-{digest[:12]}.safetensors"
            put_in_place(partial, weights)
        described = {"format": FORMAT, "weights": weights.name, "sha256": digest, **fields}
        write_whole(directory / _CONFIG, json.dumps(described, indent=1) + "\n")
        if old is not None and old != weights:
            old.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{directory}: cannot save the model ({reason})") from None


def read_model(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read back fields and tensors.

    Raises:
        CheckpointError: something is missing, damaged, not ours, or of a newer format.
    """
    fields = read_json(directory / _CONFIG)
    version = fields.pop("format", None)
    if version != FORMAT:
        raise CheckpointError(f"{directory / _CONFIG}: got format {version!r}, expected a model of format {FORMAT}")
    weights, digest = fields.pop("weights", None), fields.pop("sha256", None)
    if not isinstance(weights, str) or Path(weights).name != weights:
        raise CheckpointError(f"{directory / _CONFIG}: got weights {weights!r}, expected the name of a file beside it")
    path = directory / weights
    if not path.is_file():
        raise CheckpointError(f"{path}: got no such file, expected the weights that {_CONFIG} names")
    if _sha256(path) != digest:
        raise CheckpointError(f"{path}: got a file that does not match its checksum in {_CONFIG}")
    return fields, read_safetensors(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, not JSON, or something else than an object.
    """
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: got no such file, expected the configuration of a model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: got a file that is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: got a {type(found).__name__}, expected a JSON object")
    return found


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: got a file that cannot be read ({error})") from None


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """Give a name to write to; what still has it at the end is removed."""
    named = path.with_name(f"{path.name}-{os.getpid()}")
    try:
        yield named
    finally:
        named.unlink(missing_ok=True)


def _weights_of(directory: Path) -> Path | None:
    """Return the file of tensors of the model that stands in a directory, or None."""
    try:
        fields = read_json(directory / _CONFIG)
    except CheckpointError:
        return None
    weights = fields.get("weights")
    named = isinstance(weights, str) and weights.startswith("model-") and Path(weights).name == weights
    return directory / weights if named and isinstance(weights, str) and "sha256" in fields else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
