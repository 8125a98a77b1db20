from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from effml_diffusion.puzzles import archive as module
from effml_diffusion.puzzles.archive import Archive
from torch import Tensor


class Maker:
    """Count how often something was made."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> dict[str, Tensor]:
        self.calls += 1
        return {"x": torch.arange(5, dtype=torch.uint8), "y": torch.full((2, 3), self.calls)}


def test_what_was_made_is_found_again(tmp_path: Path) -> None:
    make = Maker()
    first = Archive(tmp_path / "a" / "b").get("thing", {"n": 3, "loops": 0.5}, make)
    again = Archive(tmp_path / "a" / "b").get("thing", {"loops": 0.5, "n": 3}, make)
    assert make.calls == 1
    assert all(torch.equal(first[name], again[name]) for name in ("x", "y"))
    assert again["x"].dtype == torch.uint8
    Archive(tmp_path / "a" / "b").get("thing", {"n": 4, "loops": 0.5}, make)
    Archive(tmp_path / "a" / "b").get("other", {"n": 3, "loops": 0.5}, make)
    assert make.calls == 3
    assert len(list((tmp_path / "a" / "b").iterdir())) == 3


def test_a_new_format_is_another_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Maker()
    Archive(tmp_path).get("thing", {}, make)
    monkeypatch.setattr(module, "FORMAT", module.FORMAT + 1)
    Archive(tmp_path).get("thing", {}, make)
    assert make.calls == 2


def test_a_damaged_file_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make = Maker()
    Archive(tmp_path).get("thing", {}, make)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[:40], whole[:-3], b"\x00" * 100, b"{}" * 50):
        path.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            made = Archive(tmp_path).get("thing", {}, make)
        assert made["y"][0, 0] == make.calls
        assert "made anew" in caplog.records[-1].getMessage()
    assert make.calls == 6
    Archive(tmp_path).get("thing", {}, make)
    assert make.calls == 6


def test_a_file_of_another_request_is_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make = Maker()
    Archive(tmp_path).get("thing", {"n": 1}, make)
    (one,) = tmp_path.iterdir()
    Archive(tmp_path).get("thing", {"n": 2}, make)
    (two,) = set(tmp_path.iterdir()) - {one}
    two.write_bytes(one.read_bytes())
    with caplog.at_level(logging.WARNING):
        Archive(tmp_path).get("thing", {"n": 2}, make)
    assert make.calls == 3
    assert "another request" in caplog.text


def test_a_kill_leaves_nothing_that_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    make = Maker()
    with monkeypatch.context() as patch:
        patch.setattr("effml_shared.files.flush", killed)
        with pytest.raises(KeyboardInterrupt):
            Archive(tmp_path).get("thing", {}, make)
    assert not list(tmp_path.glob("*.safetensors"))
    Archive(tmp_path).get("thing", {}, make)
    assert make.calls == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_a_place_that_cannot_be_written_costs_only_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a directory")
    make = Maker()
    with caplog.at_level(logging.WARNING):
        made = Archive(tmp_path / "file" / "below").get("thing", {}, make)
    assert made["y"][0, 0] == 1
    assert "cannot be kept" in caplog.text


def test_the_usual_place_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Archive().directory == tmp_path / "effml" / "puzzles"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Archive().directory == Path.home() / ".cache" / "effml" / "puzzles"
