"""What the numbers of an evaluation depend on, written before the first answer and compared before the next session.

    manifest.json     schema, started, and `identity`: model, tokenizer, engine, tasks, sampling, seed

A directory belongs to one identity: answers under another would go into other batches and differ in their last digits,
or altogether. What only concerns estimates (metrics, intervals) is no part of it and may change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from effml_shared import distributed
from effml_shared.errors import CheckpointError, ConfigError
from effml_shared.files import write_whole

__all__ = ["SCHEMA", "changed_fields", "now", "open_directory"]

SCHEMA = 1


def now() -> str:
    """Return the time, as results record it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def open_directory(path: Path, identity: Mapping[str, Any], *, resume: bool) -> str:
    """Make the directory of an evaluation, or go on with the one that is there; return when it was first begun.

    Raises:
        ConfigError: an evaluation of another identity is there (names the differing fields), or any without `resume`.
        CheckpointError: the manifest there is damaged, or the place cannot be written.
    """
    file = path / "manifest.json"
    with distributed.agreed("opening the directory of the evaluation"):
        if not file.exists() and distributed.is_main():
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"out_dir {path}: cannot be made ({error.strerror}); choose another") from None
            write_whole(file, json.dumps({"schema": SCHEMA, "started": now(), "identity": identity}, indent=1))
        elif not resume:
            raise ConfigError(f"out_dir: got {path}, which holds an evaluation, expected a new directory or resume")
    try:
        found = json.loads(file.read_text())
        schema, started, before = (found[name] for name in ("schema", "started", "identity"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error!r}); choose another out_dir") from None
    changed = changed_fields({"schema": schema, **before}, {"schema": SCHEMA, **identity})
    if changed:
        shown = "; ".join(changed[:8]) + ("; ..." if len(changed) > 8 else "")
        raise ConfigError(f"out_dir: got {path}, the evaluation of something else: {shown}; expected a new directory")
    return str(started)


def changed_fields(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Say which fields of two trees differ.

    >>> changed_fields({"model": {"id": "a"}, "seed": 0}, {"model": {"id": "b"}, "seed": 0})
    ["model.id was 'a' and is 'b'"]
    """
    old, new = _flat(before), _flat(after)
    names = [name for name in dict.fromkeys([*old, *new]) if old.get(name, "absent") != new.get(name, "absent")]
    return [f"{name} was {_short(old.get(name, 'absent'))} and is {_short(new.get(name, 'absent'))}" for name in names]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) or not tree:
        return {prefix.rstrip("."): tree}
    return {name: value for key, node in tree.items() for name, value in _flat(node, f"{prefix}{key}.").items()}


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:20]}...{shown[-8:]}"
