import dataclasses
import json
import os
import signal
from collections import Counter

import pytest
from effml_shared.citations import Paper
from effml_shared.cli import main
from effml_shared.errors import ConfigError
from effml_shared.reproduction import Reproduction, expected_seconds
from effml_shared.runs import Run


@pytest.fixture
def made(toy):
    """Count the trials that ran, so that a test can say what was not run again."""
    return Counter()


@pytest.fixture(autouse=True)
def _installed(toy, made, monkeypatch, tmp_path):
    """Three experiments as if packages announced them: one works, one has a bug until `toy.bug` is mended, one cannot
    be imported."""

    def run(config, run):
        made["toy"] += 1
        return toy.run(config, run)

    def broken(config, run):
        if not (tmp_path / "mended").exists():
            raise ZeroDivisionError("division\nby <zero>")
        return toy.run(config, run)

    paper = Paper("On & On", "2401.00001", ["Ann Author"])
    experiments = {
        "toy.bug": dataclasses.replace(toy, name="toy.bug", run=broken),
        "toy.linear": dataclasses.replace(toy, run=run, papers=(paper,)),
        "toy.missing": None,
    }

    class Entry:
        def __init__(self, name):
            self.name = name

        def load(self):
            if experiments[self.name] is None:
                raise ImportError("No module named 'torchwood'")
            return experiments[self.name]

    monkeypatch.setattr("effml_shared.experiments.discover", lambda: {name: Entry(name) for name in experiments})
    monkeypatch.setattr("effml_shared.reproduction.discover", lambda: {name: Entry(name) for name in experiments})
    monkeypatch.chdir(tmp_path)


def reproduce(out, *words):
    return main(["reproduce", "--preset", "smoke", "--out", str(out), *words])


def index(out):
    found = json.loads((out / "index.json").read_text(), parse_constant=pytest.fail)
    return found, {entry["name"]: entry for entry in found["experiments"]}


def test_what_fails_stops_nothing_else_and_stands_on_the_page(tmp_path, capsys):
    out = tmp_path / "all"
    assert reproduce(out) == 1
    shown = capsys.readouterr()
    assert shown.err == ""
    for words in ("3/3 toy.missing", "2 of 3 experiments failed", "Adam ends above SGD", "ZeroDivisionError"):
        assert words in shown.out
    found, entries = index(out)
    assert [entries[name]["status"] for name in sorted(entries)] == ["failed", "finished", "failed"]
    assert entries["toy.bug"]["error"] == "ZeroDivisionError: division by <zero>"
    assert "ZeroDivisionError" in (out / entries["toy.bug"]["traceback"]).read_text()
    assert "torchwood" in entries["toy.missing"]["error"]
    assert entries["toy.linear"]["seconds"] > 0
    assert entries["toy.linear"]["changed"] is False
    assert (out / entries["toy.linear"]["report"]).exists()
    assert sum(found["counts"].values()) == 1
    assert found["running"] is None
    page = (out / "index.html").read_text()
    assert "division by &lt;zero&gt;" in page
    assert 'http-equiv="refresh"' not in page


def test_what_is_finished_is_kept_and_what_failed_is_tried_again(tmp_path, made, capsys):
    out = tmp_path / "all"
    assert reproduce(out, "toy.linear", "toy.bug", "toy.linear") == 1
    (tmp_path / "mended").touch()
    (out / "toy.linear" / "report.html").unlink()  # as if it could not be drawn
    assert reproduce(out, "toy.bug", "toy.linear") == 0
    assert made["toy"] == 1
    assert (out / "toy.linear" / "report.html").exists()
    assert Run(out / "toy.bug").summary["status"] == "finished"
    assert "error" not in Run(out / "toy.bug").summary
    capsys.readouterr()
    assert reproduce(out, "toy.bug") == 0
    assert "1 experiment, 1 finished before" in capsys.readouterr().out
    assert set(index(out)[1]) == {"toy.bug", "toy.linear"}  # the page keeps what it had


def test_an_interrupt_says_how_to_go_on_and_that_ends_as_an_uninterrupted_run(tmp_path, capsys, monkeypatch):
    from effml_shared.progress import ProgressBar

    out = tmp_path / "all"
    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "on_step", lambda *_: os.kill(os.getpid(), signal.SIGINT))
        assert reproduce(out, "toy.linear") == 130
    command = f"effml reproduce --preset smoke --out {out} toy.linear"
    assert capsys.readouterr().err.strip() == f"effml: interrupted; continue with: {command}"
    assert index(out)[1]["toy.linear"]["status"] == "interrupted"
    assert main(command.split()[1:]) == 0
    assert reproduce(tmp_path / "whole", "toy.linear") == 0
    claims = [index(path)[1]["toy.linear"]["claims"] for path in (out, tmp_path / "whole")]
    assert claims[0] == claims[1]


def test_the_page_is_there_while_experiments_run(tmp_path, toy, monkeypatch):
    reproduction, seen = Reproduction(tmp_path / "all", "smoke", ["toy.linear"]), []

    class Look:
        def __getattr__(self, name):
            if name == "expect":
                raise AttributeError
            return lambda *_: seen.append((tmp_path / "all" / "index.html").read_text())

    assert reproduction.expected("toy.linear") == 1.0
    reproduction.run("toy.linear", [Look()])
    assert all("toy.linear is running" in page and "refresh" in page for page in seen)
    assert len(seen) > 4
    assert reproduction.entry("toy.linear")["status"] == "finished"
    assert reproduction.seconds_left(["toy.linear"]) == reproduction.expected("toy.linear") != 1.0  # at the pace seen


def test_a_killed_run_counts_as_interrupted(tmp_path):
    out = tmp_path / "all"
    run = Run.create(out / "toy.linear", {"experiment": "toy.linear", "preset": "smoke"}, "")
    run.update(status="running")
    assert Reproduction(out, "smoke", ["toy.linear"]).entry("toy.linear")["status"] == "interrupted"


def test_a_run_of_other_settings_counts_and_says_so(tmp_path, made):
    out = tmp_path / "all"
    assert main(["run", "toy.linear", "--preset", "smoke", "--out", str(out / "toy.linear"), "width=6"]) == 0
    assert reproduce(out, "toy.linear") == 0
    assert made["toy"] == 1
    assert index(out)[1]["toy.linear"]["changed"]
    assert "not the preset&#x27;s configuration" in (out / "index.html").read_text()
    assert not Reproduction(tmp_path / "b", "smoke", ["toy.linear"]).entry("toy.linear").get("changed")


@pytest.mark.parametrize(
    "summary",
    [
        {"claims": [{"verdict": "holds"}]},
        {"claims": [5]},
        {"claims": 5},
        {
            "claims": [
                {"claim": {"text": "", "paper": "", "unit": "", "at_least": 0}, "mean": 1, "low": "<b>", "high": 1}
            ]
        },
        {"seconds": "long"},
        {"seconds": {}},
    ],
)
def test_a_damaged_run_is_one_line_on_the_page(tmp_path, summary):
    out = tmp_path / "all"
    run = Run.create(out / "toy.linear", {"experiment": "toy.linear", "preset": "smoke"}, "")
    run.update(status="finished", **summary)
    assert reproduce(out, "toy.linear") == 1
    assert "is damaged" in index(out)[1]["toy.linear"]["error"]


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


WRONG = {
    "unknown experiment": lambda p: ["toy.liner"],
    "unknown preset": lambda p: ["--preset", "tpu"],
    "output is a file": lambda p: ["--out", str(write(p / "file"))],
    "output is somebody's": lambda p: ["--out", str(write(p / "site" / "index.html").parent)],
    "output cannot be written": lambda p: ["--out", "/proc/effml-page"],
    "runs of another preset": lambda p: (
        Run.create(p / "o" / "toy.linear", {"experiment": "toy.linear", "preset": "gpu"}, "")
        and ["--out", str(p / "o")]
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_invocation_is_one_line_and_touches_nothing(case, tmp_path, capsys):
    words = WRONG[case](tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["reproduce", "--preset", "smoke", *words]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("effml: error: ")
    assert shown.err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_installed(tmp_path, monkeypatch):
    monkeypatch.setattr("effml_shared.reproduction.discover", dict)
    with pytest.raises(ConfigError, match="no experiments: install"):
        Reproduction(tmp_path / "all", "smoke")


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("5 s", 5.0),
        ("1.5 min", 90.0),
        ("6 min of one core", 360.0),
        ("2 h", 7200.0),
        ("not measured", None),
        ("", None),
    ],
)
def test_announced_times(words, seconds):
    assert expected_seconds(words) == seconds


def test_cite_prints_each_paper_once(capsys):
    assert main(["cite", "toy.linear", "toy.linear"]) == 0
    entry = capsys.readouterr().out
    assert entry.count("@misc{author2024,") == 1
    assert r"On \& On" in entry
    assert main(["cite", "toy.bug"]) == 2
    assert "arXiv 0000.00000" in capsys.readouterr().err
