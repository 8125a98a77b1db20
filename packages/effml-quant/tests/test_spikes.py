import math

import numpy as np
import pytest
from effml_quant.instability.spikes import SpikeDetector, find_spikes, find_turn
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st


def naive_spikes(losses, window, threshold):
    means = np.convolve(losses, np.ones(window) / window, mode="valid")  # means[i] ends at step window + i
    above = [window + i for i in range(1, len(means)) if means[i] - means[i - 1] > threshold]
    return [step for step in above if step - 1 not in above]


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_spikes_are_where_the_moving_average_jumps(losses, window):
    threshold = 0.1234567  # no difference of means comes as close to it as rounding does
    assert find_spikes(losses, window=window, threshold=threshold) == naive_spikes(losses, window, threshold)


def test_a_spike_and_a_slow_rise_at_the_authors_settings():
    falling = [3 + 7 / (1 + step) for step in range(300)]
    assert find_spikes(falling) == []
    assert find_spikes([*falling, *[7.0] * 50]) == [301]
    assert find_spikes([*falling, *[3.7] * 50]) == []  # 0.7 above 100 steps ago: below 0.8


def test_a_loss_that_is_not_finite_is_a_spike_and_spoils_no_mean():
    losses = [1.0] * 20 + [math.nan] + [1.0] * 20 + [2.0] + [math.inf] * 2
    assert find_spikes(losses, window=5, threshold=0.1) == [21, 42]


def test_the_turn_is_where_the_rolling_mean_starts_to_rise():
    rng = np.random.default_rng(0)
    norms = np.concatenate([np.linspace(2, 1, 200), np.linspace(1, 3, 100)]) + 1e-4 * rng.standard_normal(300)
    means = np.convolve(norms, np.ones(50) / 50, mode="valid")
    slope = np.diff(means)  # slope[i] belongs to step 51 + i
    turn = next(51 + i for i in range(1, len(slope)) if slope[i] > 0 > slope[i - 1] and 51 + i > 120)
    assert find_turn(norms) == turn
    assert find_turn(norms, after=turn) != turn
    assert find_turn(np.linspace(1, 2, 300)) is None  # it never fell


def test_growth_and_variance_are_those_of_the_windows():
    rng = np.random.default_rng(1)
    norms = rng.uniform(1, 2, 250)
    detector = SpikeDetector()
    for step, norm in enumerate(norms, start=1):
        detector.update(0.0, norm)
        assert (detector.growth is None) == (step < 100)
    assert detector.growth == pytest.approx(norms[200:].mean() / norms[150:200].mean())
    assert detector.variance == pytest.approx(norms[150:].var())


def test_its_state_carries_over_and_the_hook_writes_readings():
    rng = np.random.default_rng(2)
    losses, norms = rng.uniform(0, 3, 300), rng.uniform(1, 2, 300)
    whole, first, second = (SpikeDetector(window=10, threshold=0.1, norm_window=5) for _ in range(3))
    for loss, norm in zip(losses, norms, strict=True):
        whole.update(loss, norm)
    for i in range(150):
        first.update(losses[i], norms[i])
    second.load_state_dict(first.state_dict())
    for i in range(150, 300):
        second.update(losses[i], norms[i])
    assert second.state_dict() == whole.state_dict()
    assert whole.spikes
    metrics = {"loss": 1.0, "grad_norm": 1.0}

    class FakeLoop:
        class clock:
            step = 301

    second.on_step(FakeLoop, metrics)
    assert {"grad_norm_growth", "grad_norm_variance"} < set(metrics)


@pytest.mark.parametrize("field", [{"window": 0}, {"threshold": -1}, {"norm_window": 0}, {"after": -1}])
def test_wrong_fields_are_named(field):
    with pytest.raises(ConfigError, match=f"^{next(iter(field))}: got"):
        SpikeDetector(**field)
