import math

import numpy as np
import pytest
from effml_eval.statistics.intervals import mean_estimate
from effml_eval.statistics.task_means import macro_mean, micro_mean
from effml_shared.errors import ConfigError


def test_macro_counts_tasks_and_micro_counts_questions():
    rng = np.random.default_rng(0)
    scores = {"small": rng.random(10), "large": rng.random(90)}
    tasks = {name: mean_estimate(y) for name, y in scores.items()}
    macro, micro = macro_mean(tasks), micro_mean(tasks)
    assert macro.value == pytest.approx((scores["small"].mean() + scores["large"].mean()) / 2)
    assert micro.value == pytest.approx(np.concatenate(list(scores.values())).mean())
    a, b = tasks["small"].stderr, tasks["large"].stderr
    assert macro.stderr == pytest.approx(math.hypot(a, b) / 2)
    assert micro.stderr == pytest.approx(math.hypot(10 * a, 90 * b) / 100)
    assert macro.n == micro.n == 100
    assert macro.method.startswith("macro mean of 2 tasks")
    assert micro.method.startswith("micro mean of 2 tasks")


def test_one_task_is_itself_and_an_unknown_error_stays_unknown():
    task = mean_estimate([0.0, 1.0, 1.0])
    assert macro_mean({"t": task}).ci_high == pytest.approx(task.ci_high)
    assert macro_mean({"t": task, "u": mean_estimate([1.0])}).ci_high == math.inf


def test_no_tasks():
    for mean in (macro_mean, micro_mean):
        with pytest.raises(ConfigError, match="tasks: got none"):
            mean({})
