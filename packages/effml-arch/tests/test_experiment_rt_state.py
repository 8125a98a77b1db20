from __future__ import annotations

from typing import Any

import pytest
from effml_arch.experiments.rt_state import RtStateConfig, experiment
from effml_shared.config import to_yaml
from effml_shared.errors import ConfigError
from effml_shared.report import write_report
from effml_shared.runs import Run
from effml_shared.testing.experiments import ExperimentKit


class TestRtStateExperiment(ExperimentKit):
    experiment = experiment
    interrupt_after = 11


def test_tasks_can_be_changed_from_the_command_line() -> None:
    config = experiment.configure("smoke", overrides=["parity.length=9", "recall.n_keys=4"])
    assert config.task("parity")[0].length == 9
    assert config.task("recall")[0].n_keys == 4


def test_a_training_that_diverges_leaves_its_claims_open(tmp_path: Any) -> None:
    config = experiment.configure("smoke", overrides=["lr=1e34", "clip_norm=1e30", "seeds=1"])
    run = Run.create(tmp_path / "run", {"experiment": "arch.rt_state", "preset": "smoke"}, to_yaml(config))
    verdicts = experiment.execute(config, run)
    assert {verdict.verdict for verdict in verdicts} == {"inconclusive"}
    assert run.summary["effects"]["parity"] == [None]
    assert "data:image" in write_report(run, experiment).read_text()


@pytest.mark.parametrize(
    "fields", [{"seeds": 0}, {"warmup": 400}, {"lr": -1.0}, {"clip_norm": 0.0}, {"batch_size": 0}, {"lr": float("nan")}]
)
def test_wrong_fields_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        RtStateConfig(**fields)
