from __future__ import annotations

from typing import Any

import pytest
from effml_diffusion.experiments.order import ORDERS, GridConfig, OrderConfig, experiment
from effml_diffusion.experiments.order_figures import PAGE
from effml_shared.config import to_yaml
from effml_shared.errors import ConfigError
from effml_shared.report import write_report
from effml_shared.runs import Run
from effml_shared.testing.experiments import ExperimentKit


class TestOrderExperiment(ExperimentKit):
    experiment = experiment
    interrupt_after = 6  # inside the training on large grids


def _finished(path: Any, *overrides: str) -> Run:
    config = experiment.configure("smoke", overrides=overrides)
    run = Run.create(path, {"experiment": "diffusion.order", "preset": "smoke"}, to_yaml(config))
    experiment.execute(config, run)
    return run


def test_effects_are_gaps_to_the_better_random_order_of_the_same_network(tmp_path: Any) -> None:
    # Two empty cells of a 4x4 grid: a network that knows nothing fills some of them rightly.
    run = _finished(tmp_path / "run", "small.clues=14", "puzzles=40")
    small = run.summary["sizes"]["small"]
    (margin,), (random,), (greedy,) = (small["solved"][order] for order in ("margin", "random", "random, greedy"))
    assert 0 < max(random, greedy) < 100
    assert run.summary["effects"]["small: order"] == [pytest.approx(margin - max(random, greedy))]
    assert run.summary["effects"]["small: solved"] == [margin]
    assert run.summary["effects"]["small: bound"] == [pytest.approx(small["nats"][0] - small["entropy"])]
    assert [row["order"] for row in run.summary["table"]] == 2 * list(ORDERS)


def test_the_animated_page_needs_nothing_else_and_shows_both_orders(tmp_path: Any) -> None:
    run = _finished(tmp_path / "run")
    page = (run.path / PAGE).read_text().replace("http://www.w3.org/2000/svg", "")  # a name, which nothing fetches
    assert page.count("<iframe") == 2
    assert "In margin order" in page
    assert "In random order" in page
    assert not any(link in page for link in ("http://", "https://", "src=&quot;", "href="))
    assert sum(PAGE in caption for caption in experiment.figures(run.metrics(), run.summary)) == 2


def test_a_training_that_diverges_leaves_its_claims_open(tmp_path: Any) -> None:
    run = _finished(tmp_path / "run", "large.lr=1e34", "clip_norm=1e30")
    verdicts = {claim["claim"]["effect"]: claim for claim in run.summary["claims"]}
    for effect in ("order", "fewer steps", "solved", "bound"):
        assert verdicts[f"large: {effect}"]["seeds"] == 0
        assert verdicts[f"small: {effect}"]["seeds"] == 1
    assert not (run.path / PAGE).exists()
    assert "data:image" in write_report(run, experiment).read_text()


def test_an_unknown_number_of_grids_leaves_the_bound_open(tmp_path: Any) -> None:
    run = _finished(tmp_path / "run", "small.box_rows=1", "small.box_columns=4")
    assert run.summary["effects"]["small: bound"] == [None]
    assert experiment.figures(run.metrics(), run.summary)


@pytest.mark.parametrize(
    ("preset", "size", "nats", "passes"),
    [("cpu", "small", 0.3539, (11, 3)), ("cpu", "large", 0.4765, (24, 6)), ("gpu", "large", 0.6204, (51, 13))],
)
def test_entropies_and_forward_passes(preset: str, size: str, nats: float, passes: tuple[int, int]) -> None:
    grid = experiment.configure(preset).grid(size)
    assert grid.entropy == pytest.approx(nats, abs=5e-5)
    assert (grid.sampler("margin").steps, grid.sampler("margin, 4 at once").steps) == passes


@pytest.mark.parametrize(
    "fields", [{"seeds": 0}, {"grids": 0}, {"warmup": 1.0}, {"clip_norm": 0.0}, {"precision": "float16"}]
)
def test_wrong_fields_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        OrderConfig(**fields)


@pytest.mark.parametrize(
    "fields", [{"clues": 16}, {"n_heads": 3}, {"lr": -1.0}, {"steps": 0}, {"box_rows": 9}, {"batch_size": 0}]
)
def test_wrong_fields_of_a_grid_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        GridConfig(**fields)
