import logging
import math

import pytest
from effml_quant.instability.guard import PrecisionGuard, Threshold
from effml_quant.precision.application import apply_scheme
from effml_quant.precision.scheme import PrecisionScheme
from effml_shared.errors import ConfigError
from torch import nn

USUAL, SAFE = PrecisionScheme.mx("mxfp4"), PrecisionScheme.bf16_act_all()
RHO = {"bias/rho": Threshold(1.0, 0.5)}


def make(**fields):
    handle = apply_scheme(nn.Sequential(nn.Linear(4, 4)), USUAL)
    return handle, PrecisionGuard(handle, SAFE, **{"thresholds": RHO, **fields})


def test_it_switches_with_hysteresis_and_says_why(caplog):
    handle, guard = make(patience=2, calm=2)
    states = []
    with caplog.at_level(logging.WARNING):
        for step, rho in enumerate([0.2, 1.5, 0.9, 1.2, 1.1, 0.8, 0.4, 0.6, 0.5, 0.4, 0.9, 1.3]):
            guard.update(step, {"bias/rho": rho})
            states.append(guard.is_safe)
    assert states == [False] * 4 + [True] * 5 + [False] * 3
    assert [(event.step, event.safe) for event in guard.events] == [(4, True), (9, False)]
    assert guard.events[0].reason == "bias/rho = 1.1 > 1"
    assert "step 4: to the safe scheme: bias/rho = 1.1 > 1" in caplog.text
    assert handle.scheme == USUAL


def test_readings_that_are_missing_change_nothing_and_nan_is_too_much():
    handle, guard = make(thresholds={**RHO, "clamp/gains": Threshold(0.25, 0.05)}, calm=1)
    assert not guard.update(1, {"loss": 3.0})
    assert guard.update(2, {"bias/rho": math.nan})
    assert handle.scheme == SAFE
    assert not guard.update(3, {"clamp/gains": 0.1})  # between release and trip
    assert not guard.update(4, {"bias/rho": 0.1})  # the other is not calm
    assert guard.update(5, {"clamp/gains": 0.0})
    assert handle.scheme == USUAL


def test_without_calm_it_stays_safe():
    handle, guard = make(calm=None)
    guard.update(1, {"bias/rho": 2.0})
    for step in range(2, 50):
        assert not guard.update(step, {"bias/rho": 0.0})
    assert handle.scheme == SAFE


def test_its_state_carries_over():
    _, guard = make(patience=2, calm=3)
    readings = [0.2, 1.5, 1.4, 0.4, 0.3]
    for step, rho in enumerate(readings):
        guard.update(step, {"bias/rho": rho})
    handle, other = make(patience=2, calm=3)
    other.load_state_dict(guard.state_dict())
    assert handle.scheme == SAFE
    assert other.state_dict() == guard.state_dict()
    assert other.update(5, {"bias/rho": 0.1})
    assert handle.scheme == USUAL


def test_wrong_fields_are_named():
    with pytest.raises(ConfigError, match="release: got 2"):
        Threshold(1.0, 2.0)
    for fields in ({"patience": 0}, {"calm": 0}, {"thresholds": {}}):
        with pytest.raises(ConfigError, match=f"^{next(iter(fields))}: got"):
            make(**fields)
    with pytest.raises(ConfigError, match=r"^0\.weight: got float16"):
        PrecisionGuard(apply_scheme(nn.Sequential(nn.Linear(4, 4)).half(), None), USUAL)
