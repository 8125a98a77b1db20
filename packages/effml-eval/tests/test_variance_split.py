import math

import numpy as np
import pytest
from effml_eval.statistics.variance_split import variance_split
from effml_shared.errors import ConfigError

ROWS = [[1, 1, 0, 1], [0, 0, 1, 0], [1, 1, 1, 1]]


def test_split_of_the_example():
    split = variance_split(ROWS)
    found = (split.mean, split.within, split.between, split.stderr, split.predicted_stderr(samples=1))
    assert found == pytest.approx((0.666667, 0.166667, 0.104167, 0.220479, 0.300463), abs=5e-7)
    assert split.stderr == pytest.approx(float(np.std(np.mean(ROWS, 1), ddof=1)) / math.sqrt(3))


def test_parts_are_unbiased():
    rng = np.random.default_rng(0)
    parts = []
    for _ in range(400):
        p = rng.beta(4, 2, size=(60, 1))
        split = variance_split(rng.random((60, 5)) < p)
        parts.append((split.within, split.between))
    within, between = np.mean(parts, axis=0)
    variance = 4 * 2 / (6**2 * 7)
    assert between == pytest.approx(variance, rel=0.05)
    assert within == pytest.approx(4 / 6 * 2 / 6 - variance, rel=0.03)


def test_more_questions_never_lose_to_more_samples_at_equal_cost():
    rng = np.random.default_rng(1)
    for _ in range(20):
        split = variance_split(rng.random((5, 3)))
        more_questions = split.predicted_stderr(questions=20)
        more_samples = split.predicted_stderr(samples=12)
        assert more_questions <= more_samples * (1 + 1e-12)
        assert split.floor <= more_samples
    assert "4x questions" in split.advice()


def test_samples_that_explain_everything_leave_nothing_to_the_questions():
    split = variance_split([[0, 1], [1, 0], [0, 1]])
    assert split.between == 0
    assert split.floor == 0


@pytest.mark.parametrize("rows", [[], [1.0, 2.0], [[1.0, 2.0]], [[1.0], [2.0]], [[1, 2], [3]], [[1, math.nan], [0, 1]]])
def test_wrong_rows_are_named(rows):
    with pytest.raises(ConfigError, match="scores: got"):
        variance_split(rows)


def test_wrong_plans_are_named():
    with pytest.raises(ConfigError, match="samples: got 0"):
        variance_split(ROWS).predicted_stderr(samples=0)
    with pytest.raises(ConfigError, match="factor: got 1"):
        variance_split(ROWS).advice(1)
