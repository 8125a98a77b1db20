"""`effml sweep` and `effml resume` of a sweep: what is run, what is kept, what is said."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from effml_shared.cli import main
from effml_shared.runs import Run
from effml_shared.sweeps.directory import Sweep

pytest.importorskip("submitit", reason="effml-shared[sweep] is not installed")


class Inline:
    """Jobs that run at once and in this process."""

    outlive = False
    room = 1
    started: list

    def __init__(self, folder, job, names, ids, at_once):
        self.job, self.folder = job, folder

    def start(self, names):
        for name in names:
            self.started.append(name)
            job = self.job(name)
            begun = os.path.exists(os.path.join(job.run, "manifest.json"))
            assert not main(["resume", job.run] if begun else job.begin)
        return dict.fromkeys(names, "1")

    def alive(self):
        return {}

    def stop(self):
        pass

    def log(self, name):
        return None


@pytest.fixture
def inline(announced, tmp_path, monkeypatch):
    """Run jobs in this process; the list of those that were."""
    started = []
    monkeypatch.setattr(Inline, "started", started, raising=False)
    monkeypatch.setattr("effml_shared.sweeps.local_jobs.LocalJobs", Inline)
    monkeypatch.chdir(tmp_path)
    return started


def swept(*grid, out="s", name="toy.linear", at_once=1):
    where = ["--executor", "local", "--at-once", str(at_once), "--out", str(out)]
    return main(["sweep", name, "--preset", "smoke", *where, "--grid", *grid])


def files(path):
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.rglob("*") if file.is_file()}


def table(shown):
    """Return the words of each line of the table of points."""
    lines = shown.splitlines()
    start = next(place for place, line in enumerate(lines) if "status" in line)
    return [line.split() for line in lines[start + 1 : lines.index("", start)]]


def test_every_point_is_an_ordinary_run_and_the_end_is_a_table_of_claims(inline, tmp_path, capsys):
    assert swept("width=3,4", "lr=0.1,0.2") == 0
    shown = capsys.readouterr().out
    names = ["width=3,lr=0.1", "width=3,lr=0.2", "width=4,lr=0.1", "width=4,lr=0.2"]
    assert inline == names
    run = Run(tmp_path / "s" / "width=4,lr=0.2")
    assert run.summary["status"] == "finished"
    assert (run.path / "report.html").exists()
    shown = shown[shown.rindex("claim 1:") :]
    assert [row[:3] for row in table(shown)] == [
        [width, lr, "finished"] for width in ("3", "4") for lr in ("0.1", "0.2")
    ]
    verdict = run.summary["claims"][0]["verdict"]
    assert f"({verdict})" in shown
    assert shown.splitlines()[-1] == "what differs: effml compare s"


def test_what_is_finished_is_not_touched_again(inline, tmp_path, capsys):
    assert swept("width=3,4") == 0
    before = {name: files(tmp_path / "s" / name) for name in ("width=3", "width=4")}
    inline.clear()
    assert swept("width=3,4") == 0
    assert main(["resume", "s"]) == 0
    assert inline == []
    assert swept("width=3,4,5") == 0  # the grid grows
    assert inline == ["width=5"]
    assert {name: files(tmp_path / "s" / name) for name in before} == before
    assert "3 points, 2 finished before" in capsys.readouterr().out


def test_a_point_that_failed_is_tried_again(inline, tmp_path, toy, monkeypatch, capsys):
    bug = [True]

    def broken(config, run):
        if config.width == 3 and bug:
            run.update(status="failed", error="a bug: [x]")
            return None
        return type(toy).execute(toy, config, run)

    with monkeypatch.context() as patch:
        patch.setattr("effml_shared.cli.run._execute", lambda experiment, config, run, console: broken(config, run))
        assert swept("width=3,4") == 1
    shown = capsys.readouterr().out
    assert [row[:2] for row in table(shown)] == [["3", "failed"], ["4", "finished"]]
    assert "width=3: a bug: [x]" in shown
    assert "try again: effml resume s" in shown
    inline.clear()
    assert main(["resume", "s"]) == 0
    assert inline == ["width=3"]
    assert "error" not in Run(tmp_path / "s" / "width=3").summary


def test_another_grid_in_the_same_place_is_one_line(inline, capsys):
    assert swept("width=3,4") == 0
    capsys.readouterr()
    assert swept("width=4,5") == 2
    assert "`effml resume s` continues it" in capsys.readouterr().err


def test_the_executor_stays_where_the_jobs_are(inline, tmp_path, capsys, monkeypatch):
    assert swept("width=3") == 0
    about = json.loads((tmp_path / "s" / "sweep.json").read_text())
    about["jobs"]["executor"] = "slurm"
    (tmp_path / "s" / "sweep.json").write_text(json.dumps(about))
    assert swept("width=3") == 2
    assert "--executor: got local, expected slurm, where the jobs of s are" in capsys.readouterr().err


def test_a_cluster_that_does_not_answer_is_one_line_before_anything_is_made(inline, tmp_path, capsys, monkeypatch):
    site = tmp_path / "bin"
    site.mkdir()
    for name, line in (("srun", ":"), ("squeue", "echo 'squeue: error: no controller' >&2; exit 1")):
        (site / name).write_text(f"#!/bin/sh\n{line}\n")
        (site / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(site), prepend=os.pathsep)
    assert main(["sweep", "toy.linear", "--grid", "width=3", "--executor", "slurm", "--out", "s"]) == 2
    assert "Slurm does not answer: squeue: error: no controller" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


# From here on, jobs are processes: each begins by importing torch.


def when(condition, act):
    """Act once a condition holds, beside the test."""

    def wait():
        deadline = time.monotonic() + 120
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_two_points_at_once_of_which_one_fails(installed, tmp_path, capsys):
    assert swept("needs=none,''", out=tmp_path / "s", name="toy.installed", at_once=2) == 1
    shown = capsys.readouterr().out
    events = [line.partition(": ")[2] for line in shown.splitlines() if line.startswith("needs=")]
    assert events[:2] == ["started", "started"]
    assert [row[:2] for row in table(shown)] == [["none", "failed"], ["''", "finished"]]
    (reason,) = [line for line in shown.splitlines() if line.startswith("needs=none: ZeroDivisionError")]
    assert "ZeroDivisionError: asked to fail; log: " in reason
    with open(reason.rpartition("log: ")[2]) as log:
        assert "ZeroDivisionError" in log.read()


def test_an_interrupted_sweep_saves_and_goes_on(installed, tmp_path, capsys):
    out = tmp_path / "s"
    steps = out / "lr=0.1" / "metrics.jsonl"
    words = ["sweep", "toy.installed", "seeds=[0]", "steps=40", "pause=0.1", "--executor", "local"]
    thread = when(steps.exists, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*words, "--out", str(out), "--grid", "lr=0.1"]) == 143
    thread.join()
    assert capsys.readouterr().err.strip() == f"effml: interrupted; continue with: effml resume {out}"
    assert Run(out / "lr=0.1").summary["status"] == "interrupted"
    before = len(steps.read_text().splitlines())
    assert 0 < before < 40
    assert main(["resume", str(out)]) == 0
    assert [json.loads(line)["step"] for line in steps.read_text().splitlines()] == list(range(1, 41))


@pytest.mark.slow
def test_jobs_that_outlive_a_killed_sweep_are_found_again(installed, tmp_path, capsys):
    out = tmp_path / "s"
    command = ["sweep", "toy.installed", "seeds=[0]", "steps=60", "pause=0.1", "--executor", "local"]
    words = [*command, "--at-once", "2", "--out", str(out), "--grid", "lr=0.1,0.2,0.3"]
    sweep = subprocess.Popen([sys.executable, "-m", "effml_shared.cli", *words], stdout=subprocess.DEVNULL)
    when((out / "lr=0.2" / "metrics.jsonl").exists, sweep.kill).join()
    sweep.wait()
    assert main(["resume", str(out)]) == 0
    for point in Sweep(out).points:
        rows = [json.loads(line)["step"] for line in (out / point.name / "metrics.jsonl").read_text().splitlines()]
        assert rows == list(range(1, 61))
    logs = "".join(path.read_text() for path in (out / "jobs").glob("*.out"))
    assert logs.count("run directory") == 3  # none was begun or resumed twice
    assert "lr=0.1: started" in capsys.readouterr().out
