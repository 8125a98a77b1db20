import math

import pytest
from effml_optim.experiments.soap import SoapConfig, experiment, reached_fraction
from effml_shared.config import to_yaml
from effml_shared.errors import ConfigError
from effml_shared.report import write_report
from effml_shared.runs import Run
from effml_shared.testing.experiments import ExperimentKit


class TestSoapExperiment(ExperimentKit):
    experiment = experiment
    interrupt_after = 20


def test_the_budget_that_reaches_a_loss_is_interpolated_in_the_log_of_the_budget():
    fractions, losses = [0.25, 0.5, 1.0], [3.0, 2.0, 1.0]
    assert reached_fraction(fractions, losses, 1.5) == pytest.approx(0.5 * 2**0.5)
    assert reached_fraction(fractions, losses, 3.5) == 0.25
    assert reached_fraction(fractions, losses, 0.5) == 1.0
    assert reached_fraction(fractions, [math.inf, 2.0, 1.0], 2.5) == 0.5
    assert reached_fraction(fractions, [3.0, 1.9, 2.1], 2.0) == pytest.approx(0.25 * 2 ** (1 / 1.1))


@pytest.mark.parametrize("field", [{"steps": 0}, {"learning_rates": []}, {"fractions": [0.5]}, {"precision": "fp8"}])
def test_wrong_fields_are_named(field):
    with pytest.raises(ConfigError, match=next(iter(field))):
        SoapConfig(**field)


def test_a_training_that_diverges_counts_against_its_rate_and_the_run_goes_on(tmp_path):
    config = experiment.configure("smoke", overrides=["learning_rates=[0.01,1e30]", "clip_norm=1e30"])
    run = Run.create(tmp_path / "run", {"experiment": "optim.soap", "preset": "smoke"}, to_yaml(config))
    experiment.execute(config, run)
    assert run.summary["trials"]["AdamW/lr=1e+30/budget=1/seed=0"]["loss"] is None
    assert {row["learning rate"].split()[0] for row in run.summary["table"]} == {"0.01"}
    assert "data:image" in write_report(run, experiment).read_text()
    hopeless = experiment.configure("smoke", overrides=["learning_rates=[1e30]", "clip_norm=1e30"])
    other = Run.create(tmp_path / "other", {"experiment": "optim.soap", "preset": "smoke"}, to_yaml(hopeless))
    with pytest.raises(ConfigError, match="learning_rates: AdamW, Shampoo, SOAP diverged"):
        experiment.execute(hopeless, other)
