"""Quantised tensors as plain safetensors files, written whole or not at all.

    <name>.codes, <name>.scales, <name>.global_scale, <name>.zero_points     the tensors of a QTensor
    <name>                                                                   any other tensor
    __metadata__["effml_quant"]    one JSON object: version, the user's metadata, for each QTensor its quantiser, shape,
                                   dtype and packing, and the sha256 of every tensor's bytes

Whoever reads safetensors reads these: E4M3 codes are `F8_E4M3`, E5M2 `F8_E5M2`, power-of-two scales `F8_E8M0`, packed
codes of four and six bits `U8`. Cost: one sha256 pass over the bytes in each direction. Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from effml_shared.errors import CheckpointError, ConfigError
from effml_shared.files import replacing
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from effml_quant.formats import Format
from effml_quant.qtensor import QTensor, packed_bits
from effml_quant.quantizer import Quantizer

__all__ = ["VERSION", "load_quantized", "save_quantized"]

VERSION = 1
_KEY = "effml_quant"
_PACKING = {
    4: "two codes per byte, even index low",
    6: "four codes in three bytes, least significant bit first",
    8: "one code per byte",
}


def save_quantized(path: str | Path, tensors: Mapping[str, QTensor | Tensor], metadata: Any = None) -> None:
    """Write tensors to one file, which replaces an older one only when it is complete on disk.

    Args:
        metadata: anything that JSON holds.

    Raises:
        ConfigError: two tensors would have one name in the file, or one is no tensor, or metadata is not JSON.
        CheckpointError: the file cannot be written; an older one is untouched.
    """
    plain: dict[str, Tensor] = {}
    described = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, QTensor | Tensor):
            raise ConfigError(f"{name}: got {type(tensor).__name__}, expected a QTensor or a tensor")
        parts = {name: tensor} if isinstance(tensor, Tensor) else _named(name, tensor.tensors())
        if taken := set(parts) & set(plain):
            raise ConfigError(f"tensors: got two that are called {min(taken)!r} in the file, expected different names")
        # Tied weights share memory, which the format refuses: each has its own copy in the file.
        plain |= {
            part: value.detach().cpu().clone(memory_format=torch.contiguous_format) for part, value in parts.items()
        }
        if isinstance(tensor, QTensor):
            described[name] = _describe(tensor)
    head = {
        "version": VERSION,
        "tensors": described,
        "metadata": metadata,
        "sha256": {part: _digest(value) for part, value in plain.items()},
    }
    try:
        header = {_KEY: json.dumps(head)}
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"metadata: got {metadata!r}, expected what JSON holds ({error})") from None
    _write(Path(path), plain, header)


def load_quantized(path: str | Path) -> tuple[dict[str, QTensor | Tensor], Any]:
    """Read back the tensors, on the CPU, and the metadata that `save_quantized` wrote.

    Raises:
        CheckpointError: the file is missing, truncated, altered, inconsistent or not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_KEY)
            plain = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: got a file that cannot be read ({_line(error)})") from None
    if header is None:
        raise CheckpointError(f"{path}: got a file without {_KEY!r} in its metadata, expected one of save_quantized")
    try:
        return _assemble(json.loads(header), plain)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{path}: got metadata that cannot be read ({_line(error)})") from None


def _assemble(head: dict[str, Any], plain: dict[str, Tensor]) -> tuple[dict[str, QTensor | Tensor], Any]:
    if head["version"] != VERSION:
        raise CheckpointError(f"got version {head['version']!r}, expected {VERSION}: upgrade effml-quant")
    sums = head["sha256"]
    if set(sums) != set(plain):
        odd = min(set(sums) ^ set(plain))
        raise CheckpointError(f"{odd}: got it only in the file's {'header' if odd in sums else 'tensors'}")
    for name, tensor in plain.items():
        if sums[name] != _digest(tensor):
            raise CheckpointError(f"{name}: got bytes that do not match their checksum")
    tensors: dict[str, QTensor | Tensor] = {}
    for name, about in head["tensors"].items():
        parts = {}
        for part in ("codes", "scales", "global_scale", "zero_points"):
            if f"{name}.{part}" in plain:
                parts[part] = plain.pop(f"{name}.{part}")
        tensors[name] = _build(name, about, parts)
    if both := set(tensors) & set(plain):
        raise CheckpointError(f"{min(both)}: got both a quantised and a plain tensor of this name")
    return tensors | plain, head["metadata"]


def _named(name: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{part}": tensor for part, tensor in parts.items()}


def _describe(tensor: QTensor) -> dict[str, Any]:
    return {
        "quantizer": asdict(tensor.quantizer),
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "packing": _PACKING[packed_bits(tensor.quantizer)],
    }


def _build(name: str, about: dict[str, Any], parts: dict[str, Tensor]) -> QTensor:
    shape, dtype = about["shape"], getattr(torch, str(about["dtype"]), None)
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise CheckpointError(f"{name}: got shape {shape!r}, expected a list of sizes")
    if not {"codes", "scales"} <= set(parts):
        raise CheckpointError(f"{name}: got {sorted(parts)} in the file, expected codes and scales")
    try:
        fields = dict(about["quantizer"])
        q = Quantizer(_format(dict(fields.pop("format"))), **fields)
        packing = _PACKING[packed_bits(q)]
        if about["packing"] != packing:
            raise CheckpointError(f"{name}: got packing {about['packing']!r}, expected {packing!r}")
        if "global_scale" in parts and not 0 < float(parts["global_scale"]) < float("inf"):
            raise CheckpointError(
                f"{name}.global_scale: got {parts['global_scale']}, expected a positive finite number"
            )
        return QTensor(quantizer=q, shape=torch.Size(shape), dtype=dtype, **parts)  # type: ignore[arg-type]
    except ConfigError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _format(fields: dict[str, Any]) -> Format:
    """Make the format anew from what defines it, so that a file cannot bring one that contradicts itself."""
    found = Format(**fields)
    kept: dict[str, Any] = {"scale": found.scale, "block": found.block}
    if found.is_integer:
        made = Format.integer(found.name, found.elem_bits, step=found.spacing, **kept)
    else:
        specials = "ieee" if found.has_inf else "nan" if found.has_nan else "none"
        kept |= {"bias": found.bias, "specials": specials}
        made = Format.floating(found.name, found.exp_bits, found.man_bits, **kept)
    if made != found:
        raise ConfigError(f"format: got {fields}, expected {made}")
    return made


def _digest(tensor: Tensor) -> str:
    data = tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    return hashlib.sha256(data.numpy().data).hexdigest()


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    try:
        with replacing(path) as partial:
            save_file(tensors, partial, header)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: got tensors that cannot be written ({_line(error)})") from None


def _line(error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"{type(error).__name__}: {reason}".splitlines()[0][:300]
