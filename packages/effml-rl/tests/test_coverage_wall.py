"""The wall test: by hand, against resampling problem by problem, and its intervals on simulated populations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from effml_rl.wall.correct_matrix import CorrectMatrix
from effml_rl.wall.coverage_wall import Change, WallTest, problems_needed, wall_test
from effml_rl.wall.temperature_curves import accuracy, coverage
from effml_shared.errors import ConfigError
from effml_shared.seeding import derive_seed
from numpy.typing import NDArray

GRID = np.array([0.1, 0.5, 1.0])


def simulate(law: NDArray[np.float64], n: int, rng: np.random.Generator) -> CorrectMatrix:
    """Outcomes for precisions (temperatures, problems)."""
    return CorrectMatrix(GRID[: len(law)], (rng.random((*law.shape, n)) < law[..., None]).astype(np.int8))


def population(problems: int, rng: np.random.Generator, rows: int = 3) -> tuple[NDArray[Any], NDArray[Any]]:
    """Precisions before and after, (temperatures, problems): a third has none before, of which some is gained."""
    skill = rng.random(problems) ** 4 * (rng.random(problems) > 1 / 3)
    before = skill * np.array([[1.0], [0.8], [0.5]])[:rows]
    gained = (rng.random(problems) < 0.1) * 0.3
    return before, np.maximum(np.minimum(1, 2 * before), gained)


def test_the_interval_is_that_of_resampled_problems() -> None:
    rng = np.random.default_rng(0)
    law_before, law_after = population(40, rng)
    before, after = simulate(law_before, 8, rng), simulate(law_after, 8, rng)
    found = wall_test(before, after, 200, seed=3)
    weights = np.random.default_rng(derive_seed(3, "wall test")).multinomial(40, np.full(40, 1 / 40), 200)
    for change, curve in ((found.coverage, coverage), (found.precision, accuracy)):
        deltas = []
        for counts in weights:
            rows = np.repeat(np.arange(40), counts)
            deltas.append(curve(after.select(rows)).max() - curve(before.select(rows)).max())
        assert (change.low, change.high) == pytest.approx(tuple(np.quantile(deltas, [0.025, 0.975])), abs=1e-12)
        assert change.before == curve(before).max()
        assert change.after == curve(after).max()
        assert change.delta == change.after - change.before
    assert wall_test(before, after, 200, seed=3) == found
    assert wall_test(before, after, 200, more_than=2, temperature=0.5).coverage.before == coverage(before, 2)[1]


def test_verdicts_follow_the_rule() -> None:
    gain, loss = Change(0.3, 0.5, 0.1, 0.3), Change(0.5, 0.3, -0.3, -0.1)
    for change, expected in (
        (Change(0.4, 0.42, -0.01, 0.05), True),  # the interval holds 0
        (Change(0.4, 0.409, 0.001, 0.02), True),  # real, but less than a point
        (Change(0.4, 0.35, -0.08, -0.02), True),  # lost
        (Change(0.4, 0.5, 0.05, 0.15), False),
    ):
        assert WallTest(change, gain).hits_wall == expected
        assert not WallTest(change, loss).hits_wall


def test_sharpening_hits_the_wall_and_learning_passes_it() -> None:
    rng = np.random.default_rng(1)
    law = np.where(rng.random((1, 200)) < 0.5, 0.0, 0.3) * np.array([[1.0], [0.8], [0.5]])
    before = simulate(law, 32, rng)
    sharpened = simulate(np.where(law > 0, 0.9, 0.0), 32, rng)
    learned = simulate(np.where(rng.random((1, 200)) < 0.8, 0.5, law), 32, rng)
    assert wall_test(before, sharpened, 300).hits_wall
    assert not wall_test(before, learned, 300).hits_wall


def test_intervals_at_one_temperature_cover_and_the_best_is_biased_upward() -> None:
    n, problems, rng = 16, 100, np.random.default_rng(2)
    law_before, law_after = population(400_000, rng)
    truth = [1 - ((1 - law) ** n).mean(1) for law in (law_before, law_after)]  # expected coverage per temperature
    covers, excess = [], []
    for repeat in range(500):
        old, new = population(problems, rng)
        before, after = simulate(old, n, rng), simulate(new, n, rng)
        change = wall_test(before, after, 400, temperature=0.5, seed=repeat).coverage
        covers.append(change.low <= truth[1][1] - truth[0][1] <= change.high)
        excess.append(coverage(before).max() - truth[0].max())
    assert 0.92 <= np.mean(covers) <= 0.98
    assert np.mean(excess) > 0


def test_problems_needed_is_the_textbook_number() -> None:
    outcomes = np.zeros((1, 10, 2), np.int8)
    changed = outcomes.copy()
    changed[0, 0] = 1  # one of ten gained: variance 0.09
    before, after = CorrectMatrix(GRID[2:], outcomes), CorrectMatrix(GRID[2:], changed)
    expected = math.ceil(((1.959964 + 0.841621) / 0.02) ** 2 * 0.09)
    assert problems_needed(before, after, 1.0) == expected
    assert problems_needed(before, after, 1.0, 0.04) == math.ceil(((1.959964 + 0.841621) / 0.04) ** 2 * 0.09)
    assert problems_needed(before, before, 1.0) == 2


def test_what_cannot_be_compared_is_refused() -> None:
    matrix = simulate(np.full((3, 4), 0.5), 8, np.random.default_rng(0))
    other = simulate(np.full((3, 4), 0.5), 4, np.random.default_rng(0))
    for call, message in (
        (lambda: wall_test(matrix, other), r"after: got 4 samples per problem, expected 8"),
        (lambda: wall_test(matrix, matrix.select([0, 1])), r"after: got other problems"),
        (lambda: wall_test(matrix, matrix, 0), r"n_boot: got 0"),
        (lambda: wall_test(matrix, matrix, level=1.0), r"level: got 1.0"),
        (lambda: wall_test(matrix, matrix, more_than=8), r"more_than: got 8"),
        (lambda: wall_test(matrix, matrix, temperature=0.7), r"temperature: got 0.7"),
        (lambda: problems_needed(matrix, matrix, 1.0, 0.0), r"effect, power: got 0.0"),
        (lambda: problems_needed(matrix, matrix, 1.0, power=1.0), r"effect, power: got 0.02, 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
    assert wall_test(matrix.select([0]), matrix.select([0]), 10).coverage.delta == 0
