import math

import numpy as np
import pytest
from effml_eval.statistics.paired_tests import paired_t_test
from effml_eval.statistics.power import power_questions
from effml_shared.errors import ConfigError


def test_questions():
    assert power_questions(0.03, 0.25) == 2181
    assert power_questions(-0.03, 0.25) == 2181
    assert power_questions(1.0, 0.0) == 2


def test_so_many_questions_find_the_difference_so_often():
    rng = np.random.default_rng(0)
    questions = power_questions(0.2, 1.0, power=0.8)
    found = sum(paired_t_test(rng.normal(0.2, 1.0, questions)) < 0.05 for _ in range(500))
    assert found / 500 == pytest.approx(0.8, abs=4 * math.sqrt(0.16 / 500))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: power_questions(0, 1), "delta: got 0"),
        (lambda: power_questions(math.nan, 1), "delta: got nan"),
        (lambda: power_questions(0.1, -1), "variance: got -1"),
        (lambda: power_questions(0.1, 1, alpha=0), "alpha: got 0"),
        (lambda: power_questions(0.1, 1, power=1), "power: got 1"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
