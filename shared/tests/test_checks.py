import math

import pytest
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError


@pytest.mark.parametrize("value", [-1e-9, 1.0, math.inf, math.nan, "0.5", None])
def test_ranges_are_half_open_and_refuse_nan_and_what_is_no_number(value):
    check_range("beta", 0.0, 0.0, 1.0)
    with pytest.raises(ConfigError, match=r"beta: got .*, expected a number in \[0.0, 1.0\)"):
        check_range("beta", value, 0.0, 1.0)


@pytest.mark.parametrize("value", [0, 2.0, True, "3", None])
def test_counts_are_integers(value):
    check_count("steps", 1, 1)
    with pytest.raises(ConfigError, match=r"steps: got .*, expected an integer of at least 1"):
        check_count("steps", value, 1)


@pytest.mark.parametrize("value", ["greedy", 1, 0, None])
def test_choices_do_not_take_one_for_true(value):
    for good in (True, False, "fan_in"):
        check_choice("merge", good, (True, False, "fan_in"))
    with pytest.raises(ConfigError, match=r"merge: got .*, expected one of True, False, 'fan_in'"):
        check_choice("merge", value, (True, False, "fan_in"))
