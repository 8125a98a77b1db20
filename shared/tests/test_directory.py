"""A sweep's directory: everything is checked before it is made, and a point that is there never changes."""

import json

import pytest
from effml_shared.config import to_yaml
from effml_shared.errors import CheckpointError, ConfigError
from effml_shared.runs import Run
from effml_shared.sweeps.directory import Sweep, is_sweep

GRID = {"lr": ["0.1", "0.2"], "width": ["3"]}


def make(path, toy, grid=GRID, preset="smoke", **more):
    return Sweep.create(path, toy, preset, grid, **more)


def test_every_point_has_its_configuration(tmp_path, toy):
    sweep = make(tmp_path / "s", toy, overrides=["steps=9"])
    assert is_sweep(tmp_path / "s")
    assert [point.name for point in sweep.points] == ["lr=0.1,width=3", "lr=0.2,width=3"]
    config = toy.configure("smoke", yaml=sweep.config("lr=0.2,width=3"))
    assert (config.lr, config.width, config.steps, config.seeds) == (0.2, 3, 9, 2)
    assert sweep.varied() == ["lr"]
    assert sweep.unfinished() == ["lr=0.1,width=3", "lr=0.2,width=3"]
    assert sweep.versions["effml-shared"]


def test_status_is_what_the_run_says(tmp_path, toy):
    sweep = make(tmp_path / "s", toy)
    name = sweep.points[0].name
    assert sweep.status(name) == "to come"
    assert sweep.outcome(name) == "not begun"
    assert sweep.begun(name) is None
    config = toy.configure("smoke", yaml=sweep.config(name))
    run = Run.create(sweep.directory(name), {"experiment": toy.name, "preset": "smoke"}, to_yaml(config))
    assert sweep.status(name) == "running"
    assert sweep.outcome(name) == "interrupted"
    toy.execute(config, run)
    assert sweep.status(name) == "finished"
    assert sweep.unfinished() == [sweep.points[1].name]
    (sweep.directory(name) / "summary.json").write_text("{")
    assert sweep.status(name) == "failed"


def test_opened_again_it_is_the_same(tmp_path, toy):
    made = make(tmp_path / "s", toy, overrides=["steps=9"])
    made.record(executor="local", ids={"lr=0.1,width=3": "12"})
    opened = Sweep(tmp_path / "s")
    assert opened.points == made.points
    assert opened.jobs == {"executor": "local", "at_once": None, "slurm": [], "ids": {"lr=0.1,width=3": "12"}}
    again = make(tmp_path / "s", toy, overrides=["steps=9"])
    assert again.jobs == opened.jobs


def test_a_grid_may_grow(tmp_path, toy):
    make(tmp_path / "s", toy).record(executor="slurm")
    before = (tmp_path / "s" / "points" / "lr=0.1,width=3.yaml").read_text()
    sweep = make(tmp_path / "s", toy, {"lr": ["0.05", "0.1", "0.2"], "width": ["3", "5"]})
    assert len(sweep.points) == 6
    assert sweep.jobs["executor"] == "slurm"
    assert (tmp_path / "s" / "points" / "lr=0.1,width=3.yaml").read_text() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": {"lr": ["0.1"], "width": ["3"]}}, r"with the point lr=0.2,width=3, expected one within this grid"),
        ({"grid": {"lr": ["0.1", "0.2"]}}, r"with the point lr=0.1,width=3"),
        ({"overrides": ["steps=8"]}, r"another configuration at lr=0.1,width=3"),
        ({"preset": "cpu"}, r"sweep of preset smoke, expected cpu"),
    ],
)
def test_what_is_there_is_not_changed(tmp_path, toy, change, message):
    make(tmp_path / "s", toy)
    before = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=message):
        make(tmp_path / "s", toy, **change)
    assert {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("grid", "more", "message"),
    [
        ({}, {}, r"--grid: got no values"),
        ({"lr": []}, {}, r"--grid: got no values"),
        ({"lrr": ["1", "2"]}, {}, r"point lrr=1: unknown field lrr: did you mean lr"),
        ({"width": ["3", "0"]}, {}, r"point width=0: width: got 0, expected an integer >= 1"),
        ({"width": ["3", "[1,2]"]}, {}, r"point width=\[1,2\]: "),
        ({"lr": ["0.1", "1e-1"]}, {}, r"got lr=0.1 and lr=1e-1, which are the same configuration"),
        ({"lr": ["0.1", "0.2"]}, {"overrides": ["lr=0.3"]}, r"lr: got it both in --grid and as lr=VALUE"),
        ({"lr": ["0.1"]}, {"preset": "tpu"}, r"--preset: got 'tpu'"),
        ({"lr": ["0.1"]}, {"yaml": "none.yaml"}, r"config file none.yaml"),
    ],
)
def test_nothing_is_made_when_a_point_is_wrong(tmp_path, toy, grid, more, message):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path / "s", toy, grid, **more)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "folder"])
def test_a_place_in_use_is_left_alone(tmp_path, toy, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"in use"):
        make(tmp_path / name, toy)


@pytest.mark.parametrize(
    "damage",
    [
        lambda about: "{",
        lambda about: "[]",
        lambda about: "{}",
        lambda about: json.dumps({**about, "points": ["lr=7"]}),
        lambda about: json.dumps({**about, "grid": 3}),
        lambda about: json.dumps({**about, "grid": {}, "points": [""]}),
        lambda about: json.dumps({**about, "jobs": {"executor": "rm"}}),
        lambda about: json.dumps({**about, "jobs": {"at_once": "2"}}),
        lambda about: json.dumps({**about, "jobs": {"ids": [1]}}),
        lambda about: json.dumps({**about, "jobs": {"slurm": [1]}}),
    ],
)
def test_a_damaged_one_says_so(tmp_path, toy, damage):
    make(tmp_path / "s", toy)
    file = tmp_path / "s" / "sweep.json"
    file.write_text(damage(json.loads(file.read_text())))
    with pytest.raises(CheckpointError, match=r"sweep.json is damaged"):
        Sweep(tmp_path / "s")
