import pytest
from effml_optim.experiments.soap import SoapConfig, experiment, reached_fraction
from effml_shared.errors import ConfigError
from effml_shared.testing.experiments import ExperimentKit


class TestSoapExperiment(ExperimentKit):
    experiment = experiment
    interrupt_after = 20


def test_the_budget_that_reaches_a_loss_is_interpolated_in_the_log_of_the_budget():
    fractions, losses = [0.25, 0.5, 1.0], [3.0, 2.0, 1.0]
    assert reached_fraction(fractions, losses, 1.5) == pytest.approx(0.5 * 2**0.5)
    assert reached_fraction(fractions, losses, 3.5) == 0.25
    assert reached_fraction(fractions, losses, 0.5) == 1.0
    assert reached_fraction(fractions, [3.0, 1.9, 2.1], 2.0) == pytest.approx(0.25 * 2 ** (1 / 1.1))


@pytest.mark.parametrize("field", [{"steps": 0}, {"learning_rates": []}, {"fractions": [0.5]}, {"precision": "fp8"}])
def test_wrong_fields_are_named(field):
    with pytest.raises(ConfigError, match=next(iter(field))):
        SoapConfig(**field)
