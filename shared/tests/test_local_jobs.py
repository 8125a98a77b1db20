"""Jobs of this machine: those of an earlier session are known by their locks, and all share what the machine has."""

import fcntl
import os
import subprocess
import sys

import pytest
import torch
from effml_shared.sweeps.jobs import Job
from effml_shared.sweeps.local_jobs import LocalJobs, share_of_machine

pytest.importorskip("submitit", reason="effml-shared[sweep] is not installed")


@pytest.fixture
def jobs(tmp_path):
    def make(at_once=2):
        job = lambda name: Job(str(tmp_path / name), ["run"], str(tmp_path / "jobs" / f"{name}.lock"))  # noqa: E731
        return LocalJobs(tmp_path / "jobs", job, ["a", "b", "c"], {"a": "17"}, at_once)

    return make


def test_what_still_runs_since_an_earlier_session_takes_room_and_can_be_stopped(tmp_path, jobs):
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "b.lock").write_text("1")  # of a job that is over: its process id is somebody else's now
    with (tmp_path / "jobs" / "a.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock.fileno()])
        lock.write(str(sleeper.pid))
    found = jobs()
    assert found.alive() == {"a": "running"}
    assert found.room == 1
    assert jobs(at_once=1).room == 0
    found.stop()
    found.stop()
    assert sleeper.wait(timeout=30) == -15
    assert found.alive() == {}
    assert found.room == 2


def test_cores_are_shared_and_gpus_taken_in_turn(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert share_of_machine(0, 3) == {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    assert share_of_machine(0, 100)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [share_of_machine(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-x")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert share_of_machine(1, 3) == {"OMP_NUM_THREADS": "7", "CUDA_VISIBLE_DEVICES": "GPU-x"}
