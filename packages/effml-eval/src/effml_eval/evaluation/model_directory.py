"""A model and its tokenizer from a directory: of Hugging Face's transformers, or with checkpoints of a `Transformer`.

The first has a `config.json`, and is read by the classes that the file names (nothing is downloaded). The second holds
`step-XXXXXXXX` directories, of which the newest whole one counts; shape and tokenizer stand in the `config.yaml` of the
run that it belongs to, there or in a directory above.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from effml_shared.checkpoint import Checkpoints
from effml_shared.data.tokenizers import load_tokenizer
from effml_shared.errors import CheckpointError, require
from effml_shared.transformer import Transformer, TransformerConfig
from torch import nn

__all__ = ["load_model"]


def load_model(path: str | Path, tokenizer: str | None = None) -> tuple[Any, Any]:
    """Return the model in a directory, in evaluation mode on the CPU, and its tokenizer.

    Args:
        path: the directory.
        tokenizer: `"byte"` or a `tokenizer.json`; None: the model's own.

    Raises:
        CheckpointError: there is no model in the directory, or it cannot be read.
        DataError: the tokenizer cannot be read.
        MissingExtra: transformers is needed and not installed.
    """
    folder = Path(path)
    chosen = None if tokenizer is None else load_tokenizer(tokenizer)
    if (folder / "config.json").is_file():
        return _of_hugging_face(folder, chosen)
    if any(folder.glob("step-*")):
        return _of_checkpoints(folder, chosen)
    expected = "one with config.json (Hugging Face), or with checkpoints named step-*"
    raise CheckpointError(f"model {folder}: got a directory without a model, expected {expected}")


def _of_hugging_face(folder: Path, tokenizer: Any) -> tuple[Any, Any]:
    library = require("transformers", extra="effml-eval[hf]", purpose="to read this model")
    try:
        model = library.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
        if tokenizer is None:
            tokenizer = library.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of any class, whatever is wrong with the files
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"model {folder}: got {type(error).__name__}: {reason}") from None
    return model.eval(), tokenizer


def _of_checkpoints(folder: Path, tokenizer: Any) -> tuple[nn.Module, Any]:
    config = _run_config(folder)
    found = Checkpoints(folder).load()
    assert found is not None  # there is at least one
    if tokenizer is None:
        data = next((part for part in _parts(config) if isinstance(part.get("tokenizer"), str)), None)
        if data is None:
            raise CheckpointError(f"model {folder}: got no tokenizer in config.yaml, expected one; name it")
        tokenizer = load_tokenizer(data["tokenizer"], eos_token=data.get("eos_token"))
    names = {field.name for field in fields(TransformerConfig)}
    shape = next((part for part in _parts(config) if {"n_layers", "d_model"} <= part.keys() <= names), None)
    if shape is None:
        raise CheckpointError(f"model {folder}: got no shape of a Transformer in config.yaml, expected one")
    try:
        weights: Mapping[str, torch.Tensor] = found.state["step"]["model"]
        model = Transformer(replace(TransformerConfig(**shape), vocab_size=tokenizer.vocab_size))
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"model {found.path}: got no Transformer of that shape ({reason:.200})") from None
    return model.eval(), tokenizer


def _run_config(folder: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    files = [parent / "config.yaml" for parent in (folder, *folder.resolve().parents[:2])]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise CheckpointError(f"model {folder}: got no config.yaml there or above, expected that of the run")
    try:
        config: Any = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # YAML's many parse errors
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{file}: got {reason}, expected a readable YAML file") from None
    return config if isinstance(config, dict) else {}


def _parts(tree: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a tree and all trees in it."""
    yield tree
    for value in tree.values():
        if isinstance(value, dict):
            yield from _parts(value)
