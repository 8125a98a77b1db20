from __future__ import annotations

from typing import Any

import pytest
from effml_arch.cost_ledger import rt_cost, transformer_cost
from effml_arch.experiments.rt_lm import RtLmConfig, experiment
from effml_arch.recurrent import RecurrentTransformerConfig
from effml_arch.width_search import body_params
from effml_shared.config import to_yaml
from effml_shared.errors import ConfigError
from effml_shared.report import write_report
from effml_shared.runs import Run
from effml_shared.testing.experiments import ExperimentKit
from effml_shared.transformer import TransformerConfig


class TestRtLmExperiment(ExperimentKit):
    experiment = experiment
    interrupt_after = 20


@pytest.mark.parametrize(("preset", "deep", "shallow"), [("cpu", (2, 56), (1, 80)), ("gpu", (6, 384), (3, 512))])
def test_shapes_have_equal_parameters_and_the_shallow_ones_a_smaller_cache(
    preset: str, deep: tuple[int, int], shallow: tuple[int, int]
) -> None:
    config = experiment.configure(preset)
    shapes = config.shapes()
    for name, shape in shapes.items():
        assert (shape.n_layers, shape.d_model) == (deep if name.endswith("deep") else shallow)
        assert shape.head_dim == config.model.head_dim
        assert isinstance(shape, RecurrentTransformerConfig) == name.startswith("RT")
        assert body_params(shape) == pytest.approx(body_params(config.model), rel=0.13)
    costs = {name: (rt_cost if name.startswith("RT") else transformer_cost)(shapes[name], 64) for name in shapes}
    saved = 1 - costs["RT shallow"].kv_bytes_per_token / costs["T deep"].kv_bytes_per_token
    assert saved == pytest.approx({"cpu": 2 / 7, "gpu": 1 / 3}[preset])


def test_the_longer_training_has_the_flops_of_the_recurrent_one_and_all_models_of_a_seed_the_same_data(
    tmp_path: Any,
) -> None:
    config = experiment.configure("smoke", overrides=["steps=30", "seeds=1", "learning_rates=[0.01]"])
    run = Run.create(tmp_path / "run", {"experiment": "arch.rt_lm", "preset": "smoke"}, to_yaml(config))
    experiment.execute(config, run)
    rows = {row["model"]: row for row in run.summary["table"]}
    assert rows["T deep, equal FLOPs"]["training FLOPs, T deep = 1"] == pytest.approx(
        rows["RT deep"]["training FLOPs, T deep = 1"], abs=0.5 / 30
    )
    assert run.summary["effects"]["parameters"] == [
        run.summary["finals"]["T deep"][0] - run.summary["finals"]["RT deep"][0]
    ]
    first = {row["trial"].partition("/")[0]: row["loss"] for row in run.metrics() if row["step"] == 1}
    # Equal weights at the start and equal batches: the losses differ by what the recurrence does in a fresh model.
    assert first["T deep, equal FLOPs"] == first["T deep"] != first["RT deep"]
    assert first["RT deep"] == pytest.approx(first["T deep"], rel=0.05)


def test_a_training_that_diverges_counts_against_its_rate_and_the_run_goes_on(tmp_path: Any) -> None:
    config = experiment.configure("smoke", overrides=["learning_rates=[0.01,1e30]", "clip_norm=1e30", "seeds=1"])
    run = Run.create(tmp_path / "run", {"experiment": "arch.rt_lm", "preset": "smoke"}, to_yaml(config))
    experiment.execute(config, run)
    assert run.summary["trials"]["T deep/lr=1e+30/seed=0"]["loss"] is None
    assert {row["learning rate"].split()[0] for row in run.summary["table"]} == {"0.01"}
    assert "data:image" in write_report(run, experiment).read_text()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shallow_layers": 2}, r"shallow_layers: got 2, expected fewer than 2"),
        ({"shallow_layers": 0}, r"shallow_layers: got 0"),
        ({"betas": [0.9]}, r"betas: got \[0.9\]"),
        ({"model": TransformerConfig(causal=False)}, r"causal: got False"),
        ({"steps": 0}, r"steps: got 0"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RtLmConfig(**fields)
