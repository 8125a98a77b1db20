"""A job: locked while it lives, deaf to the signals meant for submitit, resumed where it was stopped."""

import fcntl
import os
import pickle
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from effml_shared.errors import ConfigError, MissingExtra
from effml_shared.sweeps.jobs import Job, choose_executor, job_log

pytest.importorskip("submitit", reason="effml-shared[sweep] is not installed")


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Put a script in the interpreter's place: the job's words go into `words`."""

    def become(body):
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/words\n{body}\n')
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return become


@pytest.fixture
def job(tmp_path):
    return Job(str(tmp_path / "run"), ["run", "toy"], str(tmp_path / "lock"))


def words(tmp_path):
    return (tmp_path / "words").read_text().splitlines()


def locked(path):
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def until(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_it_begins_a_run_and_later_resumes_it(tmp_path, command, job):
    command("exit 0")
    job()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").touch()
    job()
    assert words(tmp_path) == ["-m effml_shared.cli run toy", f"-m effml_shared.cli resume {tmp_path / 'run'}"]
    assert not locked(job.lock)


@pytest.mark.parametrize(("body", "code"), [("exit 3", 3), ("kill -TERM $$", 143)])
def test_it_ends_as_its_command_does(command, job, body, code):
    command(body)
    with pytest.raises(SystemExit) as stop:
        job()
    assert stop.value.code == code


def test_its_command_has_the_environment_it_was_given(tmp_path, command, job):
    command(f'echo "$COLOUR" >> {tmp_path}/words')
    job.environment = {"COLOUR": "blue"}
    job()
    assert words(tmp_path)[1] == "blue"


def test_before_a_time_limit_its_command_is_stopped_and_it_can_be_run_again(tmp_path, command, job):
    command(f"trap 'echo saved >> {tmp_path}/words; exit 143' TERM\nwhile :; do sleep 0.05; done")
    seen = {}

    def requeue(signum, frame):  # as submitit does
        seen["again"] = job.checkpoint()
        seen["words"] = words(tmp_path)
        raise SystemExit(1)

    def limit():
        until(lambda: (tmp_path / "words").exists() and locked(job.lock) and Path(job.lock).read_text())
        seen["locked"] = locked(job.lock)
        process = int(Path(job.lock).read_text())
        os.kill(process, signal.SIGUSR2)  # Slurm signals all processes of a job
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        threading.Thread(target=limit).start()
        with pytest.raises(SystemExit):
            job()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert seen["locked"]
    assert seen["words"][1:] == ["saved"]
    assert seen["again"].function == Job(job.run, job.begin, job.lock)
    assert not locked(job.lock)


def test_what_submitit_stores_of_it_is_a_name_and_strings(job):
    assert b"effml_shared.sweeps.jobs" in pickle.dumps(job, protocol=0)
    assert len(pickle.dumps(job)) < 500


def test_the_executor_is_found_or_named(monkeypatch):
    import submitit

    for found in ("local", "slurm"):
        monkeypatch.setattr(submitit.AutoExecutor, "which", staticmethod(lambda found=found: found))
        assert choose_executor("auto", []) == found
        assert choose_executor("auto", ["partition=x"]) == "slurm"
        assert choose_executor("local", []) == "local"
    with pytest.raises(ConfigError, match=r"--slurm: got it with --executor local"):
        choose_executor("local", ["partition=x"])


def test_without_submitit_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(MissingExtra, match=r"pip install 'effml-shared\[sweep\]'"):
        choose_executor("auto", [])


def test_a_log_is_where_submitit_writes_it(tmp_path):
    (tmp_path / "12_3_0_log.out").touch()
    assert job_log(tmp_path, "12_3") == tmp_path / "12_3_0_log.out"
    assert job_log(tmp_path, "13") is None
    assert job_log(tmp_path, None) is None
