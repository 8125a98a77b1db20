"""Slopes against temperature, and the share of a slope that training removed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from effml_rl.wall.correct_matrix import CorrectMatrix
from effml_rl.wall.distillation import distillation_index, temperature_area, temperature_sensitivity
from effml_shared.errors import ConfigError


def matrix(counts: list[list[int]], temperatures: tuple[float, ...] = (0.1, 0.5, 1.0, 1.5)) -> CorrectMatrix:
    outcomes = (np.arange(10) < np.array(counts)[..., None]).astype(np.int8)
    return CorrectMatrix(np.array(temperatures[: len(counts)]), outcomes)


BEFORE = matrix([[8, 2, 0], [7, 2, 0], [4, 1, 0], [1, 0, 0]])
AFTER = matrix([[10, 9, 3], [10, 9, 3], [10, 8, 0], [9, 8, 0]])


def test_sensitivity_and_area_by_hand() -> None:
    assert temperature_sensitivity(BEFORE) == pytest.approx((10 - 5) / 30)
    assert temperature_sensitivity(BEFORE, 0.5, 1.5) == pytest.approx((9 - 1) / 30)
    assert temperature_area(BEFORE) == pytest.approx((10 + 9 + 5 + 1) / 120)


def test_the_index_is_of_problems_solved_before() -> None:
    assert distillation_index(BEFORE, AFTER) == pytest.approx(1 - (1 / 20) / (5 / 20))
    assert distillation_index(BEFORE, AFTER, 0.1, 1.5) == pytest.approx(1 - (2 / 20) / (9 / 20))
    assert distillation_index(BEFORE, BEFORE) == 0
    flat = matrix([[10, 9, 0]] * 4)
    assert distillation_index(BEFORE, flat) == 1


def test_there_is_no_index_without_a_slope_before() -> None:
    rising = matrix([[1, 0, 0], [2, 0, 0], [3, 0, 0]])
    assert math.isnan(distillation_index(rising, AFTER))
    assert math.isnan(distillation_index(matrix([[0, 0, 0]] * 4), AFTER))


def test_temperatures_must_be_on_the_grid() -> None:
    with pytest.raises(ConfigError, match=r"temperature: got 1.0, expected one of \[0.1, 0.5\]"):
        temperature_sensitivity(matrix([[1], [0]]))
    with pytest.raises(ConfigError, match=r"temperature: got 0.2"):
        distillation_index(BEFORE, AFTER, 0.2)
