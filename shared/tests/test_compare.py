import pytest
from effml_shared.cli import main
from effml_shared.sweeps.directory import Sweep


@pytest.fixture(autouse=True)
def _here(announced, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run_smoke(out, *words):
    return main(["run", "toy.linear", "--preset", "smoke", "--out", str(out), *words])


def test_compare_shows_claims_and_differences(capsys, tmp_path):
    run_smoke(tmp_path / "a")
    run_smoke(tmp_path / "b", "width=7")
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "width" in shown
    assert "2 runs of toy.linear, 1 differing fields" in shown


def swept(path, toy, widths, begun):
    """Make a sweep of which only some points have run."""
    sweep = Sweep.create(path, toy, "smoke", {"width": widths, "lr": ["0.1"]})
    for point in sweep.points[:begun]:
        run_smoke(sweep.directory(point.name), "--config", str(sweep.config(point.name)))
    return sweep


def test_a_sweep_stands_for_its_points_told_apart_by_what_varies(capsys, tmp_path, toy):
    swept(tmp_path / "s", toy, ["3", "4", "5"], begun=2)
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "s")]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["claim", "width=3", "width=4"]
    assert "2 runs of toy.linear, 1 differing fields" in shown
    assert "not begun: 1 points" in shown


def test_beside_other_runs_a_point_says_of_which_sweep_it_is(capsys, tmp_path, toy):
    swept(tmp_path / "s", toy, ["3", "4"], begun=1)
    run_smoke(tmp_path / "a")
    capsys.readouterr()
    assert main(["compare", "s", "a"]) == 0
    assert "s: width=3" in capsys.readouterr().out


def test_many_runs_are_rows(capsys, tmp_path, toy):
    swept(tmp_path / "s", toy, ["1", "2", "3", "4", "5"], begun=5)
    capsys.readouterr()
    assert main(["compare", "s"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "claim 1: Adam ends above SGD; in nats"
    assert [line.split()[0] for line in lines[2:8]] == ["run", *(f"width={width}" for width in range(1, 6))]
    assert lines[9].split() == ["run", "width"]


def test_a_sweep_of_one_run_is_not_enough(capsys, tmp_path, toy):
    swept(tmp_path / "s", toy, ["3", "4"], begun=1)
    capsys.readouterr()
    assert main(["compare", "s"]) == 2
    assert "got 1 run and 1 points of a sweep that have not begun" in capsys.readouterr().err
