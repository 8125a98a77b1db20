"""Models on disk: what is written comes back, a kill leaves the old or the new one, damage is told in one line."""

import json
from pathlib import Path

import pytest
import torch
from effml_eval.sae.model_files import read_json, read_model, read_safetensors, write_model
from effml_shared.errors import CheckpointError


def tensors(seed=0):
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(3, 4, generator=g)
    return {"a": shared.T, "b": shared, "c": torch.tensor(2.5, dtype=torch.float64), "empty": torch.zeros(0, 3)}


def same(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_fields_and_tensors_come_back(tmp_path):
    write_model(tmp_path / "new" / "model", {"name": "x", "sizes": [1, 2]}, tensors())
    fields, found = read_model(tmp_path / "new" / "model")
    assert fields == {"name": "x", "sizes": [1, 2]}
    same(found, tensors())


def test_a_model_takes_the_place_of_another_and_leaves_other_files(tmp_path):
    for name in ("README.md", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_text("kept")
    for seed in (0, 1, 1):
        write_model(tmp_path, {"seed": seed}, tensors(seed))
    fields, found = read_model(tmp_path)
    assert fields == {"seed": 1}
    same(found, tensors(1))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 4
    assert names[0] == "README.md"
    assert "model-00001-of-00002.safetensors" in names


@pytest.mark.parametrize("renames", range(3))
def test_a_kill_leaves_the_old_model_or_the_new_one(tmp_path, monkeypatch, renames):
    write_model(tmp_path, {"seed": 0}, tensors(0))
    done, real = [], Path.replace

    def killed(partial: Path, path: Path) -> None:
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(path)
        real(partial, path)

    monkeypatch.setattr(Path, "replace", killed)
    if renames < 2:
        with pytest.raises(KeyboardInterrupt):
            write_model(tmp_path, {"seed": 1}, tensors(1))
    else:
        write_model(tmp_path, {"seed": 1}, tensors(1))
    fields, found = read_model(tmp_path)
    assert fields == {"seed": int(renames == 2)}
    same(found, tensors(fields["seed"]))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"got format 2, expected a model of format 1"),
        ({"format": None}, r"got format None"),
        ({"weights": "../model.safetensors"}, r"expected the name of a file beside it"),
        ({"weights": 3}, r"got weights 3"),
        ({"weights": "model-gone.safetensors"}, r"got no such file"),
        ({"sha256": "0"}, r"does not match its checksum"),
    ],
)
def test_damaged_configurations_are_refused(tmp_path, change, message):
    write_model(tmp_path, {}, tensors())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        read_model(tmp_path)


def test_files_that_cannot_be_read_or_written(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: got no such file"):
        read_model(tmp_path)
    for text, message in (("{", r"not JSON"), ("[1]", r"got a list"), ("[" * 100_000, r"not JSON")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"not JSON"):
        read_json(tmp_path / "config.json")
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04 pickled")
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        read_safetensors(tmp_path / "x.safetensors")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot save the model"):
        write_model(tmp_path / "file", {}, tensors())
    (tmp_path / "taken" / "config.json").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"^cannot write .*/taken/config\.json: Is a directory"):
        write_model(tmp_path / "taken", {}, tensors())
    assert not list((tmp_path / "taken").glob(".*"))
    write_model(tmp_path / "cut", {}, tensors())
    weights = next((tmp_path / "cut").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"checksum"):
        read_model(tmp_path / "cut")
