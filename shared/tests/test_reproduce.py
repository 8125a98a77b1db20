"""What `effml reproduce` prints; what it does is tested with `reproduction`."""

import dataclasses

import pytest
from effml_shared.cli import main


@pytest.fixture(autouse=True)
def _installed(toy, tmp_path, monkeypatch):
    def bug(config, run):
        raise ZeroDivisionError("division by zero")

    experiments = {"toy.bug": dataclasses.replace(toy, name="toy.bug", run=bug), "toy.linear": toy}

    class Entry:
        def __init__(self, name):
            self.name = name

        def load(self):
            return experiments[self.name]

    for module in ("experiments", "reproduction"):
        entries = {name: Entry(name) for name in experiments}
        monkeypatch.setattr(f"effml_shared.{module}.discover", lambda entries=entries: entries)
    monkeypatch.chdir(tmp_path)


def test_it_ends_with_a_table_a_tally_and_the_page(capsys, tmp_path):
    assert main(["reproduce", "--preset", "smoke"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 experiments, 0 finished before; page: runs/reproduction-smoke/index.html"
    assert "  failed: ZeroDivisionError: division by zero" in lines
    assert any(line.startswith("toy.linear") and "Adam ends above SGD" in line for line in lines)
    assert lines[-2].endswith("1 of 2 experiments failed")
    assert lines[-1] == "page: runs/reproduction-smoke/index.html"
    assert (tmp_path / "runs/reproduction-smoke/index.html").exists()


def test_one_experiment_that_works_is_exit_code_0(capsys):
    assert main(["reproduce", "toy.linear", "--preset", "smoke", "--out", "here"]) == 0
    assert "1 experiment, 0 finished before; page: here/index.html" in capsys.readouterr().out
