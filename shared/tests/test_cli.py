"""Whatever is typed wrongly is one line and leaves everything as it was."""

import json

import pytest
from effml_shared.cli import main


@pytest.fixture(autouse=True)
def _here(announced, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_smoke(out, *words):
    return main(["run", "toy.linear", "--preset", "smoke", "--out", str(out), *words])


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
    "sweep of an unknown field": lambda p: ["sweep", "toy.linear", "--executor", "local", "--grid", "widht=3,4"],
    "sweep of a refused value": lambda p: ["sweep", "toy.linear", "--executor", "local", "--grid", "width=3,0"],
    "sweep over what is fixed": lambda p: [
        "sweep",
        "toy.linear",
        "width=3",
        "--executor",
        "local",
        "--grid",
        "width=3,4",
    ],
    "sweep of no grid": lambda p: ["sweep", "toy.linear", "--grid", "width"],
    "sweep of an open bracket": lambda p: ["sweep", "toy.linear", "--grid", "width=[3,4"],
    "sweep without a grid": lambda p: ["sweep", "toy.linear"],
    "sweep somewhere unknown": lambda p: ["sweep", "toy.linear", "--grid", "width=3", "--executor", "tpu"],
    "sweep of none at once": lambda p: ["sweep", "toy.linear", "--grid", "width=3", "--at-once", "0"],
    "sweep into a file": lambda p: [
        *("sweep", "toy.linear", "--executor", "local", "--grid", "width=3", "--out"),
        str(write(p, "out", b"x")),
    ],
    "resume a damaged sweep": lambda p: ["resume", str(write(p, "s/sweep.json", b"{").parent)],
    "compare a damaged sweep": lambda p: ["compare", str(write(p, "s/sweep.json", b"{").parent)],
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
