import math

import numpy as np
import pytest
from effml_eval.statistics.control_variate import control_variate_mean
from effml_shared.errors import ConfigError


def population(seed: int, size: int = 5000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=size)
    return 0.5 + 0.9 * x + math.sqrt(1 - 0.81) * rng.normal(size=size), x


def test_correlation_takes_its_square_off_the_variance_and_the_interval_covers():
    y, x = population(0)
    rng = np.random.default_rng(1)
    hits, errors, plain = 0, [], []
    for _ in range(400):
        chosen = rng.choice(len(y), 80, replace=False)
        estimate = control_variate_mean(y[chosen], x[chosen], float(x.mean()))
        hits += estimate.ci_low <= y.mean() <= estimate.ci_high
        errors.append(estimate.value - y.mean())
        plain.append(y[chosen].mean() - y.mean())
    assert np.var(errors) / np.var(plain) == pytest.approx(1 - 0.81, abs=0.06)
    assert 0.91 < hits / 400 < 0.99
    assert estimate.stderr == pytest.approx(np.std(errors), rel=0.25)


def test_uncertain_reference_mean_adds_to_the_error():
    y, x = population(2, 50)
    sure, unsure = (control_variate_mean(y, x, 0.0, reference_stderr=s) for s in (0.0, 0.1))
    slope = np.polyfit(x, y, 1)[0]
    assert unsure.value == sure.value == pytest.approx(y.mean() - slope * x.mean())
    assert unsure.stderr**2 - sure.stderr**2 == pytest.approx((slope * 0.1) ** 2)


def test_useless_reference_changes_nothing():
    estimate = control_variate_mean([0, 1, 1, 0], [0.5] * 4, 0.9)
    assert estimate.value == 0.5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: control_variate_mean([1, 0], [1, 0], 0.5), "got 2 and 2, expected the same three"),
        (lambda: control_variate_mean([1, 0, 1], [1, 0, 1, 1], 0.5), "got 3 and 4"),
        (lambda: control_variate_mean([1, 0, 1], [1, 0, 1], math.nan), "reference_mean: got nan"),
        (lambda: control_variate_mean([1, 0, 1], [1, 0, 1], 0.5, reference_stderr=-1), "reference_stderr: got -1"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
