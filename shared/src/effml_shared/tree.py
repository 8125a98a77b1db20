"""Trees of tensors and plain values as one safetensors file: the form in which everything in effml is stored.

A tree is nested dicts, lists and tuples whose leaves are tensors, numbers, strings, booleans, None or torch dtypes.
Its tensors go to the file's tensor table, its skeleton to the file's header as JSON. Integer dictionary keys (as in
optimizer states), tuples, and tensors that are one and the same object (tied weights) come back as they were.
Nothing is ever pickled.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from effml_shared.errors import CheckpointError

__all__ = ["flatten", "read_tensors", "read_tree", "unflatten", "write_tensors", "write_tree"]


def flatten(tree: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Split a tree into its named tensors and its JSON skeleton; a tensor met twice is stored once.

    Raises:
        CheckpointError: a leaf is of a kind that cannot be stored; names its path.

    >>> tensors, skeleton = flatten({"state": {0: {"step": torch.tensor(3.0)}}, "lr": 0.1})
    >>> list(tensors), unflatten(skeleton, tensors)["state"][0]["step"].item()
    (['state.0.step'], 3.0)
    """
    tensors: dict[str, torch.Tensor] = {}
    names: dict[Any, str] = {}

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, torch.Tensor):
            name = names.setdefault(_identity(node) or path, path)
            tensors[name] = node.detach()
            return {"tensor": name}
        if isinstance(node, dict):
            if not all(isinstance(key, str | int) for key in node):
                raise CheckpointError(
                    f"state {path or 'root'}: got keys other than str and int, which cannot be stored"
                )
            return {"dict": [[key, visit(value, f"{path}.{key}" if path else str(key))] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            return {type(node).__name__: [visit(value, f"{path}.{i}") for i, value in enumerate(node)]}
        if isinstance(node, torch.dtype):
            return {"dtype": str(node).removeprefix("torch.")}
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise CheckpointError(f"state {path}: got a {type(node).__name__}, expected tensors, numbers, strings or None")

    return tensors, visit(tree, "")


def _identity(tensor: torch.Tensor) -> Any:
    """Return what two views of one and the same memory share; None where memory does not tell (empty, sharded)."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.numel() == 0:
        return None
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def unflatten(skeleton: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Rebuild the tree that `flatten` took apart.

    Raises:
        CheckpointError: the skeleton is not one that `flatten` makes.
    """

    def build(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        ((kind, value),) = node.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "dict":
            return {key: build(child) for key, child in value}
        if kind == "dtype" and isinstance(getattr(torch, value), torch.dtype):
            return getattr(torch, value)
        return {"list": list, "tuple": tuple}[kind](build(child) for child in value)

    try:
        return build(skeleton)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"got a state tree that cannot be rebuilt ({error!r}), expected one that effml wrote"
        ) from None


def write_tree(path: Path, tree: Any) -> None:
    """Write a tree to one safetensors file."""
    write_tensors(path, *flatten(tree))


def read_tree(path: Path) -> Any:
    """Read back what `write_tree` wrote."""
    tensors, skeleton = read_tensors(path)
    return unflatten(skeleton, tensors)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], skeleton: Any) -> None:
    """Write named tensors and a skeleton, which may also name tensors kept elsewhere, to one safetensors file."""
    metadata = {"format": "effml-tree-1", "skeleton": json.dumps(skeleton)}
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path, metadata)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """Read back the named tensors and the skeleton.

    Raises:
        CheckpointError: the file is missing, damaged or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: got a file that cannot be read ({error})") from None
    if metadata.get("format") != "effml-tree-1":
        raise CheckpointError(f"{path}: got format {metadata.get('format')!r}, expected 'effml-tree-1'")
    return tensors, json.loads(metadata["skeleton"])
