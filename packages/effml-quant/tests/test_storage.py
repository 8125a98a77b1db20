"""Files of quantised tensors: round trips, what other readers see, and every way a file can be wrong."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from effml_quant import Format, formats
from effml_quant.qtensor import QTensor, quantize
from effml_quant.storage import load_quantized, save_quantized
from effml_shared.errors import CheckpointError, ConfigError
from safetensors import safe_open
from safetensors.torch import save_file


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write(path: Path, header: dict[str, Any], data: bytes) -> None:
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + data)


def tamper(path: Path, change: Any) -> None:
    """Change our own metadata and leave the rest of the file valid."""
    header, data = read(path)
    head = json.loads(header["__metadata__"]["effml_quant"])
    change(head)
    header["__metadata__"]["effml_quant"] = json.dumps(head)
    write(path, header, data)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_quantized(path, {"w": quantize(normal(4, 64), "mxfp4"), "bias": normal(4)}, {"step": 3})
    return path


CASES = {
    "e4m3": (normal(3, 33, dtype=torch.bfloat16), {"fmt": "mxfp8_e4m3"}),
    "e5m2": (normal(3, 33), {"fmt": "mxfp8_e5m2", "axis": 0, "scale_rule": "rceil"}),
    "e3m2": (normal(3, 33), {"fmt": "mxfp6_e3m2"}),
    "mxfp4": (normal(2, 3, 64), {"fmt": "mxfp4", "axis": 1, "block_size": 2}),
    "nvfp4": (normal(20, 40), {"fmt": "nvfp4", "block_size": (16, 16)}),
    "torchao": (normal(4, 40), {"fmt": "nvfp4", "recipe": "torchao", "global_scale": 0.01}),
    "mxint8": (normal(4, 40, dtype=torch.float16), {"fmt": "mxint8"}),
    "int4": (normal(4, 33), {"fmt": "int4", "granularity": ("group", 16), "recipe": "asymmetric"}),
    "int8": (normal(4, 33).double(), {"fmt": "int8", "granularity": "channel"}),
    "scalar": (torch.tensor(3.3), {"fmt": "int4"}),
    "empty": (torch.empty(0, 32), {"fmt": "mxfp4"}),
    "mine": (normal(4, 33), {"fmt": Format.floating("e3m4", 3, 4, bias=5), "scale": "continuous"}),
    "my.integer": (normal(4, 33), {"fmt": Format.integer("int5half", 5, step=0.5, scale="e8m0", block=8)}),
}


def test_everything_comes_back(tmp_path):
    saved = {name: quantize(x, **fields) for name, (x, fields) in CASES.items()}
    plain = {"bias": normal(5), "ids": torch.arange(3), "none": torch.empty(0, 2), "flag": torch.tensor(True)}
    metadata = {"note": "ü", "list": [1, 2.5, None]}
    save_quantized(tmp_path / "a.safetensors", saved | plain, metadata)
    loaded, noted = load_quantized(tmp_path / "a.safetensors")
    assert noted == metadata
    assert set(loaded) == set(saved) | set(plain)
    for name, q in saved.items():
        back = loaded[name]
        assert isinstance(back, QTensor)
        assert (back.quantizer, back.shape, back.dtype) == (q.quantizer, q.shape, q.dtype)
        assert list(back.tensors()) == list(q.tensors())
        for part, tensor in q.tensors().items():
            found = back.tensors()[part]
            assert found.dtype == tensor.dtype
            assert torch.equal(found.reshape(-1).view(torch.uint8), tensor.reshape(-1).contiguous().view(torch.uint8))
        assert torch.equal(back.dequantize(), q.dequantize())
    for name, tensor in plain.items():
        assert torch.equal(loaded[name], tensor)


def test_what_another_reader_sees(file, tmp_path):
    header, _ = read(file)
    assert header["w.codes"]["dtype"] == "U8"
    assert header["w.codes"]["shape"] == [4, 32]
    assert header["w.scales"] == {
        "dtype": "F8_E8M0",
        "shape": [4, 2],
        "data_offsets": header["w.scales"]["data_offsets"],
    }
    about = json.loads(header["__metadata__"]["effml_quant"])
    assert about["version"] == 1
    assert about["metadata"] == {"step": 3}
    w = about["tensors"]["w"]
    assert (w["shape"], w["dtype"], w["packing"]) == ([4, 64], "float32", "two codes per byte, even index low")
    assert w["quantizer"]["format"]["name"] == "mxfp4"
    assert (w["quantizer"]["axis"], w["quantizer"]["scale_rule"]) == (-1, "floor")
    save_quantized(tmp_path / "b", {"a": quantize(normal(32), "mxfp8_e4m3"), "b": quantize(normal(32), "mxfp8_e5m2")})
    header, _ = read(tmp_path / "b")
    assert (header["a.codes"]["dtype"], header["b.codes"]["dtype"]) == ("F8_E4M3", "F8_E5M2")
    with safe_open(tmp_path / "b", framework="pt") as plain:
        assert plain.get_tensor("a.scales").dtype == torch.float8_e8m0fnu


def test_tied_and_strided_tensors_are_written_each(tmp_path):
    w = normal(8, 8)
    q = quantize(w, "mxfp8_e4m3")
    save_quantized(tmp_path / "a", {"w": w, "tied": w, "view": w[:, ::2], "t": w.T, "q": q, "p": q})
    loaded, _ = load_quantized(tmp_path / "a")
    assert torch.equal(loaded["tied"], w)
    assert torch.equal(loaded["view"], w[:, ::2])
    assert torch.equal(loaded["t"], w.T)
    assert torch.equal(loaded["p"].dequantize(), loaded["q"].dequantize())


def test_nothing_at_all(tmp_path):
    save_quantized(tmp_path / "a", {})
    assert load_quantized(tmp_path / "a") == ({}, None)


def test_a_failed_write_leaves_the_older_file(file, tmp_path, monkeypatch):
    before = file.read_bytes()

    def full(*args: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("effml_quant.storage.save_file", full)
    with pytest.raises(CheckpointError, match=r"^cannot write .*/model\.safetensors: No space left on device"):
        save_quantized(file, {"w": normal(3)})
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_write_to_nowhere(tmp_path):
    with pytest.raises(CheckpointError, match=r"^cannot write .*/missing/a: "):
        save_quantized(tmp_path / "missing" / "a", {"w": normal(3)})
    (tmp_path / "directory").mkdir()
    with pytest.raises(CheckpointError, match=r"^cannot write .*/directory: Is a directory"):
        save_quantized(tmp_path / "directory", {"w": normal(3)})
    assert os.listdir(tmp_path) == ["directory"]


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"w": 3}, None, r"w: got int, expected a QTensor or a tensor"),
        (
            {"w": quantize(normal(32), "mxfp4"), "w.codes": normal(2)},
            None,
            r"tensors: got two that are called 'w.codes'",
        ),
        ({"w": normal(2)}, {"x": normal(2)}, r"metadata: got .*, expected what JSON holds"),
        ({"w": normal(2)}, {1, 2}, r"metadata: got \{1, 2\}, expected what JSON holds"),
    ],
)
def test_what_cannot_be_saved(tmp_path, tensors, metadata, message):
    with pytest.raises(ConfigError, match=message):
        save_quantized(tmp_path / "a", tensors, metadata)
    assert not os.listdir(tmp_path)


def test_every_truncation_is_noticed(file):
    raw = file.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, len(raw) // 2, len(raw) - 1]:
        file.write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match=r"^[^\n]*model.safetensors: got a file that cannot be read [^\n]*$"):
            load_quantized(file)


def test_every_changed_byte_is_noticed(file):
    raw = file.read_bytes()
    good, _ = load_quantized(file)
    head = 8 + struct.unpack("<Q", raw[:8])[0]
    survived = []
    for at in [*range(0, 8), *range(8, head, 23), *range(head, len(raw), 5)]:
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 0x15]) + raw[at + 1 :])
        with contextlib.suppress(CheckpointError):
            survived.append((at, load_quantized(file)[0]))
    for at, loaded in survived:  # a byte of what nobody reads, or of the user's own metadata
        assert at < head
        assert all(torch.equal(_values(a), _values(b)) for a, b in zip(loaded.values(), good.values(), strict=True))
    assert len(survived) < 5


def _values(x: Any) -> torch.Tensor:
    return x.dequantize() if isinstance(x, QTensor) else x


def test_files_that_are_not_ours(tmp_path):
    with pytest.raises(CheckpointError, match=r"none: got a file that cannot be read \(FileNotFoundError"):
        load_quantized(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        load_quantized(tmp_path)
    save_file({"w": normal(3)}, tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"plain: got a file without 'effml_quant' in its metadata"):
        load_quantized(tmp_path / "plain")
    save_file({"w": normal(3)}, tmp_path / "odd", {"effml_quant": "{"})
    with pytest.raises(CheckpointError, match=r"odd: got metadata that cannot be read \(JSONDecodeError"):
        load_quantized(tmp_path / "odd")
    save_file({"w": normal(3)}, tmp_path / "deep", {"effml_quant": "[" * 100_000})
    with pytest.raises(CheckpointError, match=r"deep: got metadata that cannot be read \(RecursionError"):
        load_quantized(tmp_path / "deep")
    for text in ("3", "[]", "null", "{}", '"x"'):
        save_file({"w": normal(3)}, tmp_path / "odd", {"effml_quant": text})
        with pytest.raises(CheckpointError, match=r"odd: got metadata that cannot be read"):
            load_quantized(tmp_path / "odd")


def _set(*path: Any) -> Any:
    *keys, last, value = path

    def change(head: Any) -> None:
        for key in keys:
            head = head[key]
        head[last] = value

    return change


W, Q, F = ("tensors", "w"), ("tensors", "w", "quantizer"), ("tensors", "w", "quantizer", "format")
E2M3 = dict(vars(formats["mxfp6_e2m3"]))
E2M3.pop("grid", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("version", 2), r"got version 2, expected 1: upgrade effml-quant"),
        (_set("version", "1"), r"got version '1', expected 1"),
        (_set("sha256", "w.codes", "0" * 64), r"w.codes: got bytes that do not match their checksum"),
        (_set("sha256", "extra", "0"), r"extra: got it only in the file's header"),
        (_set("sha256", {}), r"bias: got it only in the file's tensors"),
        (_set("sha256", None), r"got metadata that cannot be read \(TypeError"),
        (
            _set(*W, "shape", [4, 32]),
            r"w: codes: got torch.uint8 \(4, 32\), expected torch.uint8 \(4, 16\) for mxfp4 \(4, 32\)",
        ),
        (_set(*W, "shape", [4, -64]), r"w: got shape \[4, -64\], expected a list of sizes"),
        (_set(*W, "shape", [4, 1e99]), r"w: got shape"),
        (_set(*W, "shape", [10**30, 64]), r"w: (codes: )?got"),
        (_set(*W, "shape", "4x64"), r"w: got shape '4x64'"),
        (_set(*W, "dtype", "int8"), r"w: dtype: got torch.int8"),
        (_set(*W, "dtype", "load"), r"w: dtype: got <function load"),
        (_set(*W, "dtype", None), r"w: dtype: got None"),
        (_set(*W, "packing", "one code per byte"), r"w: got packing 'one code per byte', expected 'two codes per byte"),
        (_set(*Q, "axis", 5), r"w: axis: got a tensor of shape \(4, 64\), expected one that has axis 5"),
        (_set(*Q, "axis", 0), r"w: codes: got"),
        (_set(*Q, "block_size", 16), r"w: scales: got torch.float8_e8m0fnu \(4, 2\), expected .* \(4, 4\)"),
        (_set(*Q, "scale_rule", "none"), r"w: scale_rule: got 'none'"),
        (_set(*Q, "recipe", "asymmetric"), r"w: recipe: got 'asymmetric'"),
        (_set(*Q, "scale", "continuous"), r"w: scales: got torch.float8_e8m0fnu"),
        (_set(*Q, "surprise", 1), r"w: quantizer: got an unknown field 'surprise'"),
        (_set(*Q, "format", "mxfp4"), r"got metadata that cannot be read \(ValueError"),
        (_set(*Q, "format", E2M3), r"w: got packing 'two codes per byte, even index low', expected 'four codes"),
        (_set(*F, "elem_bits", 8), r"w: format: got \{.*\}, expected Format"),
        (_set(*F, "max", 7.0), r"w: format: got"),
        (_set(*F, "emax", 10**9), r"w: mxfp4: got exponents 0 to 1000000000"),
        (_set(*F, "exp_bits", 60), r"w: .*got"),
        (_set(*F, "exp_bits", 0), r"w: .*got"),
        (_set(*F, "man_bits", "1"), r"got metadata that cannot be read \(TypeError"),
        (_set(*F, "surprise", 1), r"got metadata that cannot be read \(TypeError"),
        (_set("tensors", "v", {}), r"got metadata that cannot be read \(KeyError"),
        (_set("tensors", "bias", None), r"got metadata that cannot be read \(TypeError"),
        (_set("tensors", []), r"got metadata that cannot be read \(AttributeError"),
    ],
)
def test_metadata_that_contradicts_the_file(file, change, message):
    tamper(file, change)
    with pytest.raises(CheckpointError, match=rf"^[^\n]*model.safetensors: {message}[^\n]*$"):
        load_quantized(file)


def test_a_quantised_tensor_without_its_scales(file):
    tamper(file, lambda head: head["tensors"].update(bias=head["tensors"]["w"]))
    with pytest.raises(CheckpointError, match=r"bias: got \[\] in the file, expected codes and scales"):
        load_quantized(file)


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_an_impossible_scale_of_the_tensor(tmp_path, value):
    q = quantize(normal(2, 16), "nvfp4").replace_tensors(
        quantize(normal(2, 16), "nvfp4").tensors() | {"global_scale": torch.tensor(value)}
    )
    save_quantized(tmp_path / "a", {"w": q})
    with pytest.raises(CheckpointError, match=r"w.global_scale: got .*, expected a positive finite number"):
        load_quantized(tmp_path / "a")
