import json

import pytest
from effml_shared.errors import CheckpointError
from effml_shared.runs import Run, describe_machine


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
