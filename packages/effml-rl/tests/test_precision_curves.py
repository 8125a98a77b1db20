"""Precision by problem: sorted, and paired before and after."""

from __future__ import annotations

import numpy as np
import pytest
from effml_rl.wall.correct_matrix import CorrectMatrix
from effml_rl.wall.precision_curves import delta_curve, sorted_precision
from effml_rl.wall.temperature_curves import accuracy, precision
from effml_shared.errors import ConfigError

RNG = np.random.default_rng(0)


def matrix(n: int = 16, problems: int = 30) -> CorrectMatrix:
    law = RNG.random((2, problems, 1))
    return CorrectMatrix(np.array([0.5, 1.0]), (RNG.random((2, problems, n)) < law).astype(np.int8))


def test_sorted_precision_never_rises_and_is_a_permutation() -> None:
    found = matrix()
    curves = sorted_precision(found)
    assert (np.diff(curves, axis=1) <= 0).all()
    assert np.array_equal(np.sort(curves), np.sort(precision(found)))


def test_the_delta_sums_to_the_change_of_accuracy() -> None:
    before, after = matrix(), matrix()
    for temperature, row in ((0.5, 0), (1.0, 1)):
        curve = delta_curve(before, after, temperature)
        assert (np.diff(curve.before) <= 0).all()
        assert curve.delta.sum() == pytest.approx(30 * (accuracy(after)[row] - accuracy(before)[row]), abs=1e-12)
        old, new = precision(before)[row, curve.order], precision(after)[row, curve.order]
        assert np.array_equal(curve.before, old)
        np.testing.assert_allclose(curve.delta, new - old)
        np.testing.assert_allclose(curve.error, np.sqrt(old * (1 - old) / 16 + new * (1 - new) / 16))


def test_only_pairs_have_a_delta() -> None:
    with pytest.raises(ConfigError, match=r"after: got 8 samples per problem, expected 16"):
        delta_curve(matrix(), matrix(n=8), 0.5)
    with pytest.raises(ConfigError, match=r"after: got other problems"):
        delta_curve(matrix(), matrix(problems=3), 0.5)
    with pytest.raises(ConfigError, match=r"temperature: got 0.7"):
        delta_curve(matrix(), matrix(), 0.7)
