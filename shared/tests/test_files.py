"""Whatever ends a write (a full disk, an exception, a kill), there is the old file or the new one, and nothing else."""

import os
import signal
from pathlib import Path

import pytest
import torch
from effml_shared import files
from effml_shared.errors import CheckpointError
from effml_shared.files import flush, put_in_place, replacing, write_whole
from safetensors.torch import load_file, save_file


def stream(path, content):
    """Write as those do who have too much for one string."""
    with replacing(path) as partial, partial.open("w") as file:
        for start in range(0, len(content), 100):
            file.write(content[start : start + 100])


def tensors(path, content):
    with replacing(path) as partial:
        save_file({"x": torch.full((len(content),), ord(content[0]), dtype=torch.uint8)}, partial)


WRITERS = {writer.__name__: writer for writer in (write_whole, stream, tensors)}


@pytest.fixture(params=WRITERS)
def write(request):
    return WRITERS[request.param]


def test_the_new_file_takes_the_old_ones_place(tmp_path, write):
    path = tmp_path / "x"
    for content in ("a" * 900, "b" * 3, "c"):
        write(path, content)
        written = bytes(load_file(path)["x"].tolist()) if write is tensors else path.read_bytes()
        assert written == content.encode()
    assert os.listdir(tmp_path) == ["x"]


def test_text_is_utf8_and_bytes_are_bytes(tmp_path):
    write_whole(tmp_path / "x", "\N{GREEK SMALL LETTER PI}\n")
    assert (tmp_path / "x").read_bytes() == b"\xcf\x80\n"
    write_whole(tmp_path / "x", b"\xff\r\n")
    assert (tmp_path / "x").read_bytes() == b"\xff\r\n"
    write_whole(tmp_path / "x", "")
    assert (tmp_path / "x").read_bytes() == b""


def test_a_full_disk_costs_nothing_and_is_one_line_that_names_the_file(tmp_path, full_disk, write):
    path = tmp_path / "old"
    write(path, "a")
    before = path.read_bytes()
    for name in ("old", "new"):
        with full_disk(5_000), pytest.raises(CheckpointError, match=rf"^cannot write .*/{name}: .*File too") as caught:
            write(tmp_path / name, "b" * 10_000)
        assert "\n" not in str(caught.value)
        assert os.listdir(tmp_path) == ["old"]
        assert path.read_bytes() == before


def test_a_place_that_cannot_be_written_is_named(tmp_path, write):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"^cannot write .*/none/x: .*No such file"):
        write(tmp_path / "none" / "x", "a")
    with pytest.raises(CheckpointError, match=r"^cannot write .*/file/x: .*Not a directory"):
        write(tmp_path / "file" / "x", "a")
    with pytest.raises(CheckpointError, match=r"^cannot write .*/directory: Is a directory"):
        write(tmp_path / "directory", "a")
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]
    assert os.listdir(tmp_path / "directory") == []


def test_no_name_at_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (Path(), Path("..")):
        with pytest.raises(CheckpointError, match=r"^cannot write \."):
            write_whole(path, "a")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_the_block_raises_is_passed_on(tmp_path, error):
    def interrupted():
        with replacing(tmp_path / "x") as partial:
            partial.write_text("half")
            raise error("me")

    write_whole(tmp_path / "x", "old")
    with pytest.raises(error, match=r"^me$"):
        interrupted()
    with pytest.raises(CheckpointError, match=r"^cannot write .*/x: No such file"), replacing(tmp_path / "x"):
        pass  # nothing is written
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "old"


@pytest.mark.parametrize("call", range(1, 5))
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path, call):
    """Kill a process at its n-th change of the disk: opening the partial file, renaming it, removing it."""
    path = tmp_path / "x"
    write_whole(path, "old")
    child = os.fork()
    if child == 0:
        left = call

        def count(event, arguments):
            nonlocal left
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in ("os.rename", "os.remove") or writes:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        import sys

        sys.addaudithook(count)
        write_whole(path, "new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (call < 4)
    assert path.read_text() == ("old" if call < 3 else "new")
    assert {name for name in os.listdir(tmp_path) if not name.endswith(".partial")} == {"x"}
    write_whole(path, "next")
    assert path.read_text() == "next"


def test_two_writers_at_once_do_not_mix(tmp_path):
    path = tmp_path / "x"
    with replacing(path) as one:
        one.write_text("one")
        with replacing(path) as two:
            two.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["x"]


def test_the_bytes_are_on_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    done, real = [], Path.replace

    def replace(partial, path):
        done.append(("rename", partial, path))
        return real(partial, path)

    def waited(path):
        flush(path)
        done.append(("flush", path))

    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(files, "flush", waited)
    partial, path = tmp_path / "x.part", tmp_path / "x"
    partial.write_text("whole")
    put_in_place(partial, path)
    assert done == [("flush", partial), ("rename", partial, path), ("flush", tmp_path)]
    assert path.read_text() == "whole"
    write_whole(path, "again")
    assert [event[0] for event in done[3:]] == ["flush", "rename", "flush"]
