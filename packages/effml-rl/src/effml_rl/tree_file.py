"""One tree of tensors and plain values per file, which appears whole or not at all; nothing is ever pickled.

A file is written beside its place, flushed and renamed, so that a kill at any instant leaves the old file or the new.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from effml_shared.errors import CheckpointError
from effml_shared.files import replacing
from effml_shared.tree import read_tree, write_tree

__all__ = ["load_tree", "save_tree"]


def save_tree(path: str | Path, kind: str, tree: Any) -> None:
    """Write a tree to a safetensors file, in place of an older one.

    Args:
        kind: what it is and its format's version, such as `"correct matrix 1"`; to be asked for by `load_tree`.

    Raises:
        CheckpointError: the file cannot be written; an older one is untouched.
    """
    path = Path(path)
    with replacing(path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tree(partial, {"kind": kind, "content": tree})


def load_tree(path: str | Path, kind: str) -> Any:
    """Read back what `save_tree` wrote under the same kind.

    Raises:
        CheckpointError: the file is missing, damaged, or holds something else.
    """
    try:
        tree = read_tree(Path(path))
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: got a header that cannot be read ({error!r}), expected a {kind!r}") from None
    if not isinstance(tree, dict) or tree.get("kind") != kind or "content" not in tree:
        found = tree.get("kind") if isinstance(tree, dict) else type(tree).__name__
        raise CheckpointError(f"{path}: got {found!r}, expected a {kind!r}")
    return tree["content"]
