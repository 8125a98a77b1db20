"""Larger logits and nothing learned, on a model small enough to be exact: softmax over a few answers per problem."""

from __future__ import annotations

import numpy as np
import pytest
from effml_rl.wall.correct_matrix import CorrectMatrix
from effml_rl.wall.distillation import distillation_index
from effml_rl.wall.logit_scaling import fit_scaling, scale_logits
from effml_rl.wall.temperature_curves import accuracy, coverage
from effml_shared.errors import ConfigError
from numpy.typing import NDArray

LOGITS = np.random.default_rng(0).normal(size=(300, 6)) + np.eye(6)[0]  # answer 0 is right, and a little likelier
GRID = np.array([0.1, 0.25, 0.5, 1.0, 2.0, 4.0])


def right(logits: NDArray[np.float64], temperatures: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probability of answer 0, (temperatures, problems)."""
    scaled = logits / temperatures[:, None, None]
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True))[..., 0]


def sampled(logits: NDArray[np.float64], grid: NDArray[np.float64], n: int = 64) -> CorrectMatrix:
    """The same noise at every temperature and for every model."""
    noise = np.random.default_rng(1).random((len(logits), n))
    return CorrectMatrix(grid, (noise < right(logits, grid)[..., None]).astype(np.int8))


def test_the_limits_of_temperature() -> None:
    cold, hot = right(LOGITS, np.array([1e-7, 1e6]))
    np.testing.assert_allclose(cold, LOGITS.argmax(1) == 0, atol=1e-12)
    np.testing.assert_allclose(hot, 1 / 6, atol=1e-5)
    assert hot.mean() ** (4 * 5 + 3) < 1e-17  # an answer of 23 words


@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_scaled_logits_are_another_temperature(factor: float) -> None:
    before = sampled(LOGITS, GRID)
    scaled = scale_logits(before, factor)
    np.testing.assert_allclose(right(factor * LOGITS, factor * GRID), right(LOGITS, GRID), rtol=1e-12)
    exact = sampled(factor * LOGITS, factor * GRID)
    assert np.array_equal(scaled.temperatures, exact.temperatures)
    assert np.array_equal(scaled.outcomes, exact.outcomes)


def expected_coverage(logits: NDArray[np.float64], grid: NDArray[np.float64], n: int = 8) -> NDArray[np.float64]:
    return 1 - ((1 - right(logits, grid)) ** n).mean(1)


def test_scaling_distils_without_changing_what_is_covered() -> None:
    law = right(LOGITS, GRID).mean(1)
    exact = 1 - (law[0] - law[1]) / (law[0] - law[3])  # P1_4(0.4) = P1(0.1), P1_4(1) = P1(0.25)
    assert 0.5 < exact < 1
    unscaled, scaled = expected_coverage(LOGITS, GRID), expected_coverage(4 * LOGITS, 4 * GRID)
    assert scaled.max() == pytest.approx(unscaled.max(), rel=1e-12)

    before = sampled(LOGITS, GRID, 2000)
    after = scale_logits(before, 4.0)
    assert distillation_index(before, after) == pytest.approx(exact, abs=0.02)
    assert coverage(after).max() == coverage(before).max()


def test_on_one_grid_the_best_temperature_moves_and_coverage_with_it() -> None:
    narrow = GRID[:4]
    assert expected_coverage(4 * LOGITS, narrow).max() < expected_coverage(LOGITS, narrow).max() - 0.04
    assert distillation_index(sampled(LOGITS, narrow), sampled(4 * LOGITS, narrow)) > 0


def test_the_fit_finds_the_factor_and_leaves_what_is_not_trivial() -> None:
    grid = np.geomspace(0.025, 4, 25)
    before = sampled(LOGITS, grid, 256)
    found = fit_scaling(before, sampled(4 * LOGITS, grid, 256))
    assert found.factor == pytest.approx(4, rel=0.05)
    assert np.abs(found.residual).max() < 0.01
    assert fit_scaling(before, before).factor == 1.0
    np.testing.assert_allclose(fit_scaling(before, before).residual, 0, atol=1e-12)
    better = sampled(LOGITS + 2 * np.eye(6)[0], grid, 256)
    learned = fit_scaling(before, better)
    assert learned.residual.mean() > 0.1
    np.testing.assert_allclose(learned.explained + learned.residual, accuracy(better))


def test_what_is_no_factor_or_no_pair_is_refused() -> None:
    before = sampled(LOGITS, GRID)
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"factor: got"):
            scale_logits(before, factor)
    with pytest.raises(ConfigError, match=r"after: got 4 samples"):
        fit_scaling(before, sampled(LOGITS, GRID, 4))
