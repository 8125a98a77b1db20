from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from effml_eval.activations.embedding_files import read_embeddings
from effml_shared.errors import ConfigError, DataError
from safetensors.torch import save_file

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))


def write_parquet(path: Path, **columns: Any) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), path)
    return path


def resident(path: Path) -> int:
    """Return how many kilobytes of a file this process holds in memory."""
    total, mine = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            mine = words[-1] == str(path)
        elif mine and words[0] == "Rss:":
            total += int(words[1])
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_npy(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.npy"
    np.save(path, X.to(dtype).numpy())
    found = read_embeddings(path, dim=5)
    assert found.dtype == dtype
    assert torch.equal(found, X.to(dtype))
    np.save(path, np.asfortranarray(X.numpy()))
    assert torch.equal(read_embeddings(path), X)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"ids": torch.arange(7), "x": X.to(dtype)}, path)
    assert torch.equal(read_embeddings(path), X.to(dtype))
    save_file({"image": X, "text": -X}, path)
    assert torch.equal(read_embeddings(str(path), field="text"), -X)
    with pytest.raises(
        DataError, match=r"got 2 fields that may be embeddings, \['image', 'text'\], expected one or its name"
    ):
        read_embeddings(path)
    with pytest.raises(
        DataError, match=r"got the fields \['image', 'text'\] that may be embeddings, expected 'audio' among"
    ):
        read_embeddings(path, field="audio")


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    names = pyarrow.array(list("abcdefg")).dictionary_encode()
    path = write_parquet(tmp_path / "x.parquet", name=names, x=X.tolist())
    assert torch.equal(read_embeddings(path).float(), X)
    with pytest.raises(DataError, match=r"got the fields \['x'\] that may be embeddings, expected 'name' among them"):
        read_embeddings(path, field="name")
    fixed = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(X.flatten().numpy()), 5)
    found = read_embeddings(write_parquet(path, x=fixed, y=fixed), field="y")
    assert found.dtype == torch.float32
    assert torch.equal(found, X)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's account of memory")
def test_what_is_not_taken_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effml_eval.activations.embedding_files.check_embeddings", lambda *_, **__: None)
    x = torch.ones(1 << 19, 16)
    np.save(tmp_path / "x.npy", x.numpy())
    save_file({"x": x}, tmp_path / "x.safetensors")
    for name in ("x.npy", "x.safetensors"):
        found = read_embeddings(tmp_path / name)
        assert float(found[40_000, 3]) == 1.0
        assert 0 < resident(tmp_path / name) < 8192  # of 32768: the system reads some of what is around


@pytest.mark.parametrize("suffix", ["npy", "safetensors", "parquet"])
def test_names_damaged_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    with pytest.raises(DataError, match=r"No such file"):
        read_embeddings(path)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.\w+: got an empty file"):
        read_embeddings(path)
    if suffix == "npy":
        np.save(path, X.numpy())
    elif suffix == "safetensors":
        save_file({"x": X}, path)
    else:
        write_parquet(path, x=X.tolist())
    whole = path.read_bytes()
    for size in (3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"expected a readable, whole \.\w+ file") as caught:
            read_embeddings(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(bytes(range(256)) * 4)
    with pytest.raises(DataError, match=r"expected a readable"):
        read_embeddings(path)


def test_names_what_is_no_matrix_of_numbers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"got \.csv, expected one of \.safetensors, \.npy, \.parquet"):
        read_embeddings(tmp_path / "x.csv")
    np.save(tmp_path / "x.npy", np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"expected a readable, whole"):
        read_embeddings(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", np.arange(6).reshape(2, 3))
    with pytest.raises(DataError, match=r"got int64, expected float16, float32 or float64"):
        read_embeddings(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", X.numpy().astype(">f4"))
    with pytest.raises(DataError, match=r"got >f4, expected .* of this machine's byte order"):
        read_embeddings(tmp_path / "x.npy")
    np.save(tmp_path / "x.npy", X.numpy())
    with pytest.raises(ConfigError, match=r"x\.npy: got 5 dimensions, expected 4"):
        read_embeddings(tmp_path / "x.npy", dim=4)
    np.save(tmp_path / "x.npy", np.zeros((0, 5), np.float32))
    with pytest.raises((DataError, ConfigError), match=r"x\.npy: got "):
        read_embeddings(tmp_path / "x.npy")
    save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(DataError, match=r"got 0 fields that may be embeddings, \[\]"):
        read_embeddings(tmp_path / "x.safetensors")


def test_names_lists_that_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for column, match in (
        ([[1.0, 2.0], [3.0]], r"got lists of lengths \['1', '2'\] in 'x', expected one length"),
        ([[1.0, 2.0], None], r"got lists of lengths .* expected one length"),
        ([["a"], ["b"]], r"got lists of object in 'x', expected floating-point"),
        ([[1, 2], [3, 4]], r"got lists of int64 in 'x'"),
        ([1.0, 2.0], r"got 0 fields that may be embeddings"),
    ):
        with pytest.raises(DataError, match=match):
            read_embeddings(write_parquet(path, x=column))
