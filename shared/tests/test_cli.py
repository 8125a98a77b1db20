import json
import os
import shutil
import signal

import pytest
from effml_shared.cli import main
from effml_shared.runs import Run


@pytest.fixture(autouse=True)
def _here(announced, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_smoke(out, *words):
    return main(["run", "toy.linear", "--preset", "smoke", "--out", str(out), *words])


def test_list_shows_claims_and_times(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert "toy.linear" in shown
    assert "SGD beats Adam" in shown
    assert "smoke 1 s" in shown


def test_run_ends_with_claims_and_a_report(capsys, tmp_path):
    assert run_smoke(tmp_path / "r", "width=6") == 0
    shown = capsys.readouterr().out
    assert "Adam ends above SGD" in shown
    assert str(tmp_path / "r" / "report.html") in shown.replace("\n", "")
    assert "width: 6" in (tmp_path / "r" / "config.yaml").read_text()
    assert (tmp_path / "r" / "report.html").stat().st_size > 10_000


def test_run_makes_a_directory_of_its_own(tmp_path):
    assert main(["run", "toy.linear", "--preset", "smoke"]) == 0
    (made,) = (tmp_path / "runs").iterdir()
    assert made.name.startswith("toy.linear-20")


def test_an_interrupt_prints_the_resume_command_and_resume_finishes(capsys, tmp_path, toy, monkeypatch):
    from effml_shared.progress import ProgressBar

    def interrupt(self, loop, metrics):
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "on_step", interrupt)
        assert run_smoke(tmp_path / "r", "width=5") == 130
    captured = capsys.readouterr()
    assert captured.err.strip() == f"effml: interrupted; continue with: effml resume {tmp_path / 'r'}"
    assert Run(tmp_path / "r").summary["status"] == "interrupted"
    assert main(["report", str(tmp_path / "r")]) == 0
    assert "no claim judged yet" in capsys.readouterr().out
    assert main(["resume", str(tmp_path / "r")]) == 0
    assert Run(tmp_path / "r").summary["status"] == "finished"
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "r")]) == 0
    assert "is finished" in capsys.readouterr().out
    (tmp_path / "r" / "report.html").unlink()
    assert main(["report", str(tmp_path / "r")]) == 0
    assert (tmp_path / "r" / "report.html").exists()


def test_compare_shows_claims_and_differences(capsys, tmp_path):
    run_smoke(tmp_path / "a")
    run_smoke(tmp_path / "b", "width=7")
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "width" in shown
    assert "2 runs of toy.linear, 1 differing fields" in shown


def test_doctor_answers(capsys):
    assert main(["doctor"]) == 0
    assert "effml can run here" in capsys.readouterr().out


def damaged(path, name, content):
    run_smoke(path)
    (path / name).write_text(content)
    return path


def without(path, name):
    run_smoke(path)
    (path / name).unlink()
    return path


WRONG = {
    "no command": lambda p: [],
    "unknown command": lambda p: ["rnu", "toy.linear"],
    "unknown option": lambda p: ["run", "toy.linear", "--prest", "smoke"],
    "abbreviated option": lambda p: ["run", "toy.linear", "--pre", "smoke"],
    "option without value": lambda p: ["run", "toy.linear", "--out"],
    "unknown experiment": lambda p: ["run", "toy.liner"],
    "no experiment": lambda p: ["run"],
    "unknown preset": lambda p: ["run", "toy.linear", "--preset", "tpu"],
    "unknown field": lambda p: ["run", "toy.linear", "widht=3"],
    "unknown nested field": lambda p: ["run", "toy.linear", "model.width=3"],
    "field of a number": lambda p: ["run", "toy.linear", "width.x=3"],
    "wrong type": lambda p: ["run", "toy.linear", "width=abc"],
    "a fraction for an integer": lambda p: ["run", "toy.linear", "steps=1.5"],
    "null": lambda p: ["run", "toy.linear", "steps=null"],
    "no value": lambda p: ["run", "toy.linear", "width="],
    "negative": lambda p: ["run", "toy.linear", "width=-8"],
    "zero": lambda p: ["run", "toy.linear", "seeds=0"],
    "not key=value": lambda p: ["run", "toy.linear", "width"],
    "not YAML": lambda p: ["run", "toy.linear", "width=[1"],
    "missing config file": lambda p: ["run", "toy.linear", "--config", str(p / "none.yaml")],
    "directory as config file": lambda p: ["run", "toy.linear", "--config", str(p)],
    "binary config file": lambda p: ["run", "toy.linear", "--config", str(write(p, "c.yaml", b"\xff\xfe\x00\x01"))],
    "config file of another schema": lambda p: ["run", "toy.linear", "--config", str(write(p, "c.yaml", b"lrs: 3"))],
    "output is a file": lambda p: ["run", "toy.linear", "--out", str(write(p, "out", b"x"))],
    "output below a file": lambda p: ["run", "toy.linear", "--out", str(write(p, "out", b"x") / "r")],
    "output holds files": lambda p: ["run", "toy.linear", "--out", str(write(p, "d/out", b"x").parent)],
    "output cannot be written": lambda p: ["run", "toy.linear", "--out", "/proc/effml-run"],
    "resume nothing": lambda p: ["resume", str(p / "none")],
    "resume a file": lambda p: ["resume", str(write(p, "out", b"x"))],
    "resume an empty directory": lambda p: ["resume", str(p)],
    "report nothing": lambda p: ["report", str(p / "none")],
    "damaged summary": lambda p: ["report", str(damaged(p / "r", "summary.json", "{"))],
    "summary of something else": lambda p: ["report", str(damaged(p / "r", "summary.json", "{}"))],
    "damaged metrics": lambda p: ["report", str(damaged(p / "r", "metrics.jsonl", "{\n"))],
    "no configuration": lambda p: ["report", str(without(p / "r", "config.yaml"))],
    "damaged manifest": lambda p: ["resume", str(damaged(p / "r", "manifest.json", ""))],
    "manifest of an unknown experiment": lambda p: [
        "report",
        str(damaged(p / "r", "manifest.json", json.dumps({"experiment": "gone.away", "preset": "smoke"}))),
    ],
    "compare one": lambda p: ["compare", str(damaged(p / "r", "x", ""))],
    "compare with nothing": lambda p: ["compare", str(p / "none"), str(p / "none")],
}


def write(path, name, content):
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_bytes(content)
    return path / name


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_invocation_is_one_line_and_exit_code_2(case, tmp_path, capsys):
    arguments = WRONG[case](tmp_path)
    capsys.readouterr()
    before = sorted(p for p in tmp_path.rglob("*"))
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("effml: error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out
    assert sorted(p for p in tmp_path.rglob("*")) == before  # nothing lost, nothing half-written


def test_a_resume_from_damaged_checkpoints_is_one_line(tmp_path, capsys, monkeypatch):
    from effml_shared.progress import ProgressBar

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "on_step", lambda self, loop, metrics: os.kill(os.getpid(), signal.SIGTERM))
        assert run_smoke(tmp_path / "r") == 143
    for file in (tmp_path / "r" / "checkpoints").rglob("state.safetensors"):
        file.write_bytes(file.read_bytes()[:-3])
    capsys.readouterr()
    assert main(["resume", str(tmp_path / "r")]) == 2
    assert "is whole" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "r" / "checkpoints")
    assert main(["resume", str(tmp_path / "r")]) == 0
