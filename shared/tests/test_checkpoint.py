import errno
import json
import os
import signal

import pytest
import torch
from effml_shared.checkpoint import FORMAT, Checkpoints
from effml_shared.errors import CheckpointError


def steps(checkpoints):
    return sorted(p.name for p in checkpoints.directory.iterdir())


def state(step):
    return {"w": torch.full((100,), float(step)), "step": step}


def test_saves_load_and_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert checkpoints.load() is None
    for step in (1, 5, 12):
        path = checkpoints.save(step, state(step), {"mine": step})
    assert steps(checkpoints) == ["step-00000005", "step-00000012"]
    found = checkpoints.load()
    assert (found.step, found.path, found.rank_state) == (12, path, {"mine": 12})
    assert torch.equal(found.state["w"], state(12)["w"])
    checkpoints.remove()
    assert checkpoints.load() is None


def test_saving_a_step_again_replaces_it(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state(1))
    checkpoints.save(3, state(2))
    assert checkpoints.load().state["step"] == 2
    assert steps(checkpoints) == ["step-00000003"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "no manifest", "empty manifest", "newer"])
def test_a_damaged_newest_is_reported_and_the_one_before_used(tmp_path, caplog, damage):
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(1, state(1))
    newest = checkpoints.save(2, state(2))
    file, manifest = newest / "state.safetensors", newest / "manifest.json"
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[:-1])
    elif damage == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "delete":
        file.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text()[:40])
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "empty manifest":
        manifest.write_text("[]")
    else:
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": FORMAT + 1}))
    found = checkpoints.load()
    assert found.step == 1
    (record,) = caplog.records
    assert str(newest) in record.getMessage()
    assert "\n" not in record.getMessage()
    checkpoints.save(2, state(7))  # the run reaches the damaged step again
    assert checkpoints.load().state["step"] == 7


def test_nothing_but_damaged_ones_is_an_error_not_a_fresh_start(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    (checkpoints.save(1, state(1)) / "state.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        checkpoints.load()


@pytest.mark.parametrize("call", range(1, 14))
def test_a_kill_at_any_system_call_of_a_save_leaves_a_whole_checkpoint(tmp_path, call):
    """Replay one save, killed at its n-th change of the disk; the parent then loads."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state(1))
    child = os.fork()
    if child == 0:
        left = call

        def count(event, arguments):
            nonlocal left
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree") or writes:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        import sys

        sys.addaudithook(count)
        checkpoints.save(2, state(2))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = Checkpoints(tmp_path, keep=1).load()
    assert found.state["step"] in (1, 2)
    assert torch.equal(found.state["w"], state(found.step)["w"])
    if os.WIFEXITED(status):
        assert found.step == 2
    Checkpoints(tmp_path, keep=1).save(3, state(3))
    assert steps(checkpoints) == ["step-00000003"]


@pytest.mark.parametrize(
    ("name", "size"), [("state.safetensors", 30_000), ("rank-00000.safetensors", 30_000), ("manifest.json", 250)]
)
def test_a_full_disk_is_one_line_that_names_the_file_and_costs_nothing(tmp_path, full_disk, name, size):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))
    large = torch.zeros(20_000)
    with full_disk(size), pytest.raises(CheckpointError, match=rf"step-00000002/{name}: .*File too large") as caught:
        checkpoints.save(2, large if name.startswith("state") else {}, large if name.startswith("rank") else None)
    assert "\n" not in str(caught.value)
    assert steps(checkpoints) == ["step-00000001"]
    assert checkpoints.load().step == 1


@pytest.mark.parametrize("name", ["rank-00000.safetensors", "state.safetensors", "manifest.json"])
def test_what_a_disk_reports_only_when_it_is_flushed_names_the_file_too(tmp_path, monkeypatch, name):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(name):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match=rf"cannot save to .*/step-00000002/{name}: No space left on device;"):
            checkpoints.save(2, state(2))
    assert steps(checkpoints) == ["step-00000001"]
    assert checkpoints.load().step == 1


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot save to"):
        Checkpoints(tmp_path / "file" / "c").save(1, state(1))
    with pytest.raises(CheckpointError, match="keep: got 0"):
        Checkpoints(tmp_path, keep=0)


def test_a_state_that_cannot_be_stored_leaves_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1))
    with pytest.raises(CheckpointError, match="state x"):
        checkpoints.save(2, {"x": object()})
    assert checkpoints.load().step == 1
    checkpoints.save(3, state(3))
    assert steps(checkpoints) == ["step-00000001", "step-00000003"]
