import math

import pytest
from effml_shared.errors import ConfigError
from effml_shared.schedules import Clock, cosine


def test_cosine_is_the_closed_form_in_samples_whatever_the_steps():
    plan = cosine(16, total=1600, warmup=160, floor=0.1)
    for samples in range(0, 1601, 16):
        got = plan(Clock(step=7, samples=samples)).lr_factor
        if samples < 160:
            want = (samples + 16) / 160
        else:
            want = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (samples - 160) / 1440))
        assert got == pytest.approx(want, abs=1e-15)
    assert plan(Clock(samples=10**9)).lr_factor == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"batch_size": 0, "total": 10}, "batch_size"),
        ({"batch_size": 1, "total": 10, "warmup": 10}, "warmup"),
        ({"batch_size": 1, "total": 10, "warmup": -1}, "warmup"),
        ({"batch_size": 1, "total": 10, "floor": 1.5}, "floor"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ConfigError, match=name):
        cosine(**arguments)
