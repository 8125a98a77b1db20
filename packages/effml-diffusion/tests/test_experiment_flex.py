from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_diffusion.experiments import flex_maze
from effml_diffusion.experiments.flex import FlexConfig, experiment
from effml_diffusion.experiments.flex_figures import PAGE
from effml_diffusion.experiments.flex_maze import MazeStudy, RoomStudy
from effml_diffusion.experiments.flex_text import TextStudy
from effml_diffusion.experiments.flex_training import Shape, Training, stream
from effml_diffusion.puzzles.maze_paths import remove_pads
from effml_shared.config import to_yaml
from effml_shared.errors import ConfigError
from effml_shared.report import write_report
from effml_shared.runs import Run
from effml_shared.testing.experiments import ExperimentKit


class TestFlexExperiment(ExperimentKit):
    experiment = experiment
    interrupt_after = 6


def test_the_page_of_a_plan_is_written_and_a_divergence_leaves_claims_open(tmp_path: Any) -> None:
    words = ["maze.training.lr=1e34", "maze.training.clip_norm=1e30", "maze.heads=[expectation]"]
    config = experiment.configure("smoke", overrides=words)
    run = Run.create(tmp_path / "run", {"experiment": "diffusion.flex", "preset": "smoke"}, to_yaml(config))
    verdicts = experiment.execute(config, run)
    assert {verdict.verdict for verdict in verdicts} == {"inconclusive"}  # one seed, too
    assert run.summary["effects"]["planning"] == [None]
    assert run.summary["effects"]["few_steps_length"] != [None]
    assert not (run.path / PAGE).exists()
    assert "data:image" in write_report(run, experiment).read_text()


def test_spread_legs_are_the_same_paths() -> None:
    study = MazeStudy()
    paths = study.paths(canvas=True)
    samples = stream(paths, 1).next(64)
    spread = flex_maze._scatter(paths, samples)
    assert (spread["input_ids"] != samples["input_ids"]).any(1).sum() > 32
    assert torch.equal(spread["input_ids"][samples["fixed"]], samples["input_ids"][samples["fixed"]])
    ours, lengths = remove_pads(spread["input_ids"], paths.pad_id)
    theirs, expected = remove_pads(samples["input_ids"], paths.pad_id)
    assert torch.equal(lengths, expected)
    assert torch.equal(ours, theirs)
    assert study.maze().solved(ours, lengths, samples["waypoints"]).all()


def test_no_tested_task_is_trained_on() -> None:
    study = MazeStudy(n=3, test_paths=50)
    tests = flex_maze._tests(study)["waypoints"]
    training = stream(flex_maze._TrainingPaths(study.paths()), 1).next(5000)["waypoints"]
    assert len(tests) == 50
    assert not {tuple(task) for task in tests.tolist()} & {tuple(task) for task in training.tolist()}
    assert len({tuple(task) for task in training.tolist()}) > 2000
    on_canvas = flex_maze._tests(study, study.paths(canvas=True))["waypoints"]
    assert torch.equal(tests, on_canvas)


def test_ceilings_are_the_share_of_tasks_with_room_for_every_leg() -> None:
    found = flex_maze.ceilings(RoomStudy(n=3, loops=0.0, inner=[0, 2, 12], tasks=400), seed=1)
    assert found["0"] == pytest.approx(1.0, abs=0.02)  # a single leg has the whole canvas, but for the longest 1%
    assert 0.4 < found["2"] < 1.0
    assert found["12"] < 0.3


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (FlexConfig, {"seeds": 0}),
        (MazeStudy, {"heads": ["distribution"]}),
        (MazeStudy, {"sampling_steps": [4]}),
        (RoomStudy, {"inner": [2]}),
        (RoomStudy, {"share": 1.5}),
        (TextStudy, {"draws": 3}),
        (TextStudy, {"longest": 1}),
        (Training, {"warmup": 600}),
        (Training, {"precision": "half"}),
        (Shape, {"d_model": 0}),
    ],
)
def test_wrong_fields_are_named(kind: type, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        kind(**fields)
