import json
import os
import signal

import pytest
from effml_shared.errors import CheckpointError
from effml_shared.loop import Budget, Loop
from effml_shared.runs import Run, describe_machine
from effml_shared.schedules import Plan


def new(path):
    return Run.create(path, {"experiment": "x", "preset": "smoke"}, "a: 1\n")


def test_a_new_run_is_complete_and_readable_at_once(tmp_path):
    run = new(tmp_path / "r")
    again = Run(run.path)
    assert again.manifest["experiment"] == "x"
    assert again.manifest["versions"]["torch"]
    assert again.summary == {"status": "running", "trials": {}}
    assert again.config_yaml.read_text() == "a: 1\n"
    assert again.metrics() == []


def test_a_finished_trial_never_runs_again(tmp_path):
    run = new(tmp_path / "r")
    assert run.trial("a/1", lambda trial: {"loss": float("nan"), "n": (1, 2)}) == {"loss": None, "n": [1, 2]}
    assert Run(run.path).trial("a/1", lambda trial: pytest.fail("ran again")) == {"loss": None, "n": [1, 2]}
    json.loads((run.path / "summary.json").read_text(), parse_constant=pytest.fail)


def test_a_line_cut_short_by_a_kill_is_not_read(tmp_path):
    run = new(tmp_path / "r")
    (run.path / "metrics.jsonl").write_text('{"trial": "a", "step": 1}\n{"trial": "a", "st')
    assert run.metrics() == [{"trial": "a", "step": 1}]


def test_a_damaged_line_is_named(tmp_path):
    run = new(tmp_path / "r")
    (run.path / "metrics.jsonl").write_text('{"trial": "a", "step": 1}\n{"trial\n{"trial": "a", "step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: line 2 is damaged"):
        run.metrics()


def test_a_place_in_use_is_never_overwritten(tmp_path):
    run = new(tmp_path / "r")
    with pytest.raises(CheckpointError, match="effml resume"):
        new(run.path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(CheckpointError, match="in use"):
        new(tmp_path / "full")
    with pytest.raises(CheckpointError, match="in use"):
        new(tmp_path / "full" / "thesis.tex")
    with pytest.raises(CheckpointError, match="cannot write"):
        new(tmp_path / "full" / "thesis.tex" / "run")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "x"
    (tmp_path / "empty").mkdir()
    new(tmp_path / "empty")


@pytest.mark.parametrize("call", range(1, 13))
def test_a_making_that_was_killed_is_made_again(tmp_path, call):
    """Kill `create` at its n-th change of the disk: the place is then as good as new, or holds a whole run."""
    path = tmp_path / "r"
    child = os.fork()
    if child == 0:
        left = call

        def count(event, arguments):
            nonlocal left
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in ("os.rename", "os.mkdir", "os.remove") or writes:
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        import sys

        sys.addaudithook(count)
        new(path)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if not (path / "manifest.json").exists():
        assert os.WIFSIGNALED(status)
        if (path / "config.yaml").exists():
            with pytest.raises(CheckpointError, match="cut short before anything ran: run it again"):
                Run(path)
        new(path)
    run = Run(path)
    assert run.summary == {"status": "running", "trials": {}}
    assert run.config_yaml.read_text() == "a: 1\n"
    with pytest.raises(CheckpointError, match="effml resume"):
        new(path)


class Steps:
    """A step and its data, none of which does anything."""

    def next(self, batch_size):
        return batch_size

    def __call__(self, batch, plan):
        return {"loss": 0.5, "note": 1 / 3}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def train(trial, samples):
    loop = Loop(Steps(), Steps(), lambda clock: Plan(1), budget=Budget(samples=samples), hooks=trial.hooks)
    return {"samples": loop.run().samples}


def test_a_full_disk_leaves_whole_lines_and_names_the_file(tmp_path, full_disk):
    run = new(tmp_path / "r")
    with full_disk(5_000), pytest.raises(CheckpointError, match=r"^cannot write .*metrics\.jsonl: File too") as caught:
        run.trial("a", lambda trial: train(trial, 1_000))
    assert "\n" not in str(caught.value)
    written = (run.path / "metrics.jsonl").read_bytes()
    assert 4_000 < len(written) <= 5_000
    assert written.endswith(b"\n")
    assert [row["step"] for row in run.metrics()] == list(range(1, written.count(b"\n") + 1))
    Run(run.path).trial("a", lambda trial: train(trial, 100))
    assert [row["step"] for row in run.metrics()] == list(range(1, 101))


def test_a_full_disk_keeps_the_old_file(tmp_path, full_disk):
    run = new(tmp_path / "r")
    before = {path.name for path in run.path.iterdir()}
    with (
        full_disk(5_000),
        pytest.raises(CheckpointError, match=r"^cannot write .*/summary\.json: File too large; free"),
    ):
        run.update(note="x" * 10_000)
    assert Run(run.path).summary == {"status": "running", "trials": {}}
    assert {path.name for path in run.path.iterdir()} == before


@pytest.mark.parametrize("damage", ["missing", "empty", "file", "json", "keys", "list"])
def test_what_is_no_run_is_one_line(tmp_path, damage):
    path = tmp_path / "r"
    if damage == "empty":
        path.mkdir()
    elif damage == "file":
        path.write_text("x")
    elif damage == "json":
        (new(path).path / "summary.json").write_text("{")
    elif damage in ("keys", "list"):
        (new(path).path / "summary.json").write_text({"keys": "{}", "list": "[]"}[damage])
    with pytest.raises(CheckpointError, match="got no readable run") as caught:
        Run(path)
    assert "\n" not in str(caught.value)


def test_the_machine_is_described():
    about = describe_machine()
    assert about["versions"]["effml-shared"]
    assert about["machine"]["threads"] >= 1
    json.dumps(about)
