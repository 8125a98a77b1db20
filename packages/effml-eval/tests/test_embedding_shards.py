from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from effml_eval.activations.embedding_shards import EmbeddingShards, ShardWriter, save_embeddings
from effml_shared.errors import CheckpointError, ConfigError, DataError
from torch import Tensor

GENERATOR = torch.Generator().manual_seed(0)
IMAGES, TEXTS = torch.randn(10, 4, generator=GENERATOR), torch.randn(25, 4, generator=GENERATOR)
NUMBERS, PARTNERS = torch.arange(10) * 7, torch.arange(25) % 10 * 7


def write(directory: Path, rows_per_shard: int = 4, dtype: torch.dtype = torch.float32) -> EmbeddingShards:
    with ShardWriter(directory, rows_per_shard=rows_per_shard, dtype=dtype) as writer:
        for start in range(0, 10, 3):
            writer.add("image", IMAGES[start : start + 3], NUMBERS[start : start + 3])
            writer.add("text", TEXTS[2 * start : 2 * start + 6], PARTNERS[2 * start : 2 * start + 6])
        writer.add("text", TEXTS[24:], PARTNERS[24:])
    return EmbeddingShards(directory)


@pytest.mark.parametrize("rows_per_shard", [1, 4, 5, 100])
def test_what_was_written_comes_back(tmp_path: Path, rows_per_shard: int) -> None:
    shards = write(tmp_path, rows_per_shard)
    assert (shards.sizes, shards.dim, shards.dtype) == ({"image": 10, "text": 25}, 4, torch.float32)
    assert len(list(tmp_path.glob("*.safetensors"))) == -(-10 // rows_per_shard) + -(-25 // rows_per_shard)
    rows = np.array([24, 0, 7, 7, 3])
    assert torch.equal(shards.take("text", rows), TEXTS[rows])
    assert shards.take("image", rows[:0]).shape == (0, 4)
    assert shards.fingerprint == EmbeddingShards(tmp_path).fingerprint
    with ShardWriter(tmp_path / "others", rows_per_shard=rows_per_shard) as writer:
        writer.add("image", -IMAGES, NUMBERS)  # all at once
        writer.add("text", TEXTS, PARTNERS)
    others = EmbeddingShards(tmp_path / "others")
    assert torch.equal(others.take("text", rows), TEXTS[rows])
    assert {**others.fingerprint, "embeddings": 0} == {**shards.fingerprint, "embeddings": 0}
    assert others.fingerprint != shards.fingerprint


def test_half_precision(tmp_path: Path) -> None:
    shards = write(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(shards.take("image", np.arange(10)), IMAGES.bfloat16())


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_pairs(tmp_path: Path, chunk: int) -> None:
    found = list(write(tmp_path).pairs("image", "text", chunk=chunk))
    assert max(len(text) for _, text in found) == min(chunk, 25)
    assert torch.equal(torch.cat([image for image, _ in found]), IMAGES[PARTNERS // 7])
    assert torch.equal(torch.cat([text for _, text in found]), TEXTS)


def test_mismatched_pairs(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.add("image", IMAGES[:3])
        writer.add("text", TEXTS[:4])
    with pytest.raises(
        ConfigError, match=r"pairs: got 1 of 4 rows of text without a partner in image \(first: number 3"
    ):
        EmbeddingShards(tmp_path).pairs("image", "text")
    with pytest.raises(ConfigError, match=r"modality: got 'audio', expected one of 'image', 'text'"):
        EmbeddingShards(tmp_path).pairs("audio", "text")


def test_saves_what_is_embedded(tmp_path: Path) -> None:
    embed = {"image": lambda batch: batch["pixels"] * 2, "text": lambda batch: batch["ids"] + 1}
    batches = [("image", {"pixels": IMAGES}, NUMBERS), ("text", {"ids": TEXTS}, PARTNERS)]
    shards = save_embeddings(embed, batches, tmp_path / "new", rows_per_shard=6)
    assert torch.equal(shards.take("image", np.arange(10)), IMAGES * 2)
    assert torch.equal(shards.take("text", np.arange(25)), TEXTS + 1)
    with pytest.raises(ConfigError, match=r"modality: got 'audio', expected one of 'image', 'text'"):
        save_embeddings(embed, [("audio", {}, None)], tmp_path / "other")


# Bad input


def test_refuses_rows(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("image", IMAGES)
    for x, match in (
        (TEXTS[:, :3], r"text from row 0, as torch.float32: got 3 dimensions, expected 4"),
        (TEXTS * torch.nan, r"got 25 of 25 rows that hold NaN"),
        (TEXTS * 0, r"got 25 of 25 rows that are zero"),
        (TEXTS[0], r"got shape \(4,\)"),
        (TEXTS[:0], r"got shape \(0, 4\)"),
    ):
        with pytest.raises(ConfigError, match=match):
            writer.add("text", x)
    with pytest.raises(ConfigError, match=r"pair: got shape \(3,\), expected \(25,\)"):
        writer.add("text", TEXTS, torch.arange(3))
    with pytest.raises(ConfigError, match=r"modality: got '\.\./text'"):
        writer.add("../text", TEXTS)
    half = ShardWriter(tmp_path / "half", dtype=torch.float16)
    with pytest.raises(
        ConfigError, match=r"image from row 0, as torch.float16: got 10 of 10 rows that hold NaN or inf"
    ):
        half.add("image", IMAGES * 1e9)
    with pytest.raises(ConfigError, match=r"embeddings: got none to write"), ShardWriter(tmp_path / "none"):
        pass


def test_what_was_interrupted_is_not_read(tmp_path: Path) -> None:
    def interrupted(batch: Tensor) -> Tensor:
        raise KeyboardInterrupt

    embed: Any = {"image": torch.clone, "text": interrupted}
    with pytest.raises(KeyboardInterrupt):
        save_embeddings(embed, [("image", IMAGES, None), ("text", TEXTS, None)], tmp_path, rows_per_shard=2)
    with pytest.raises(DataError, match=r"manifest\.json: got .*No such file.*, expected the manifest of whole"):
        EmbeddingShards(tmp_path)
    write(tmp_path)  # once more, into the same folder
    with pytest.raises(ConfigError, match=r"directory: got .*, which holds embeddings, expected a new one"):
        ShardWriter(tmp_path)


@pytest.mark.parametrize("name", ["text-00001.safetensors", "manifest.json"])
def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    rename = Path.replace

    def refused(partial: Path, path: Path) -> Path:
        if path.name == name:
            raise OSError(28, "No space left on device")
        return rename(partial, path)

    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(CheckpointError, match=rf"^cannot write .*/{name}: No space left on device; free space"):
        write(tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert not (tmp_path / name).exists()


def test_names_damaged_folders(tmp_path: Path) -> None:
    shards = write(tmp_path)
    path = tmp_path / "image-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-8])
    with pytest.raises(DataError, match=r"image-00001\.safetensors: got .*, expected a readable, whole shard"):
        EmbeddingShards(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"image-00001\.safetensors: got "):
        EmbeddingShards(tmp_path)
    path.write_bytes((tmp_path / "image-00002.safetensors").read_bytes())
    with pytest.raises(DataError, match=r"got \(2, 4\), expected \(4, 4\) as in the manifest"):
        EmbeddingShards(tmp_path)
    manifest = tmp_path / "manifest.json"
    damaged = json.dumps({**json.loads(manifest.read_text()), "shards": [{"file": "image-00000.safetensors"}]})
    for text, match in (
        ("{", r"manifest\.json: got Expecting"),
        ("[]", r"got another format"),
        ('{"format": 2}', r"got another format"),
        ('{"format": "effml-embeddings-1", "dim": 4, "shards": []}', r"got a damaged manifest"),
        (damaged, r"got a damaged manifest"),
    ):
        manifest.write_text(text)
        with pytest.raises(DataError, match=match):
            EmbeddingShards(tmp_path)
    with pytest.raises(ConfigError, match=r"rows: got -1 to 3, expected 0 to 9"):
        shards.take("image", np.array([-1, 3]))
