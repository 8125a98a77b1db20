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
