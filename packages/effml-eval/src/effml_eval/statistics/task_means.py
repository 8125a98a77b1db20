"""One number for several tasks: the macro mean (tasks count equally) or the micro mean (questions count equally).

    macro = sum value_t / T            SE = sqrt(sum SE_t^2) / T
    micro = sum n_t value_t / N        SE = sqrt(sum (n_t SE_t)^2) / N         N = sum n_t

for tasks whose errors are independent. The two differ as soon as sizes do, so the method always names which it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from effml_shared.errors import ConfigError
from scipy import special

from effml_eval.statistics.estimate import Estimate
from effml_eval.statistics.scores import check_level

__all__ = ["macro_mean", "micro_mean"]


def macro_mean(tasks: Mapping[str, Estimate], level: float = 0.95) -> Estimate:
    """Average tasks, each with the same weight.

    >>> half, whole = Estimate(0.5, 0.03, 0, 1, 10, ""), Estimate(1.0, 0.04, 0, 1, 90, "")
    >>> print(macro_mean({"a": half, "b": whole}))
    0.7500 ± 0.0250 [0.7010, 0.7990]
    """
    return _weighted(tasks, dict.fromkeys(tasks, 1), level, "macro")


def micro_mean(tasks: Mapping[str, Estimate], level: float = 0.95) -> Estimate:
    """Average tasks, each weighted with its number of questions.

    >>> half, whole = Estimate(0.5, 0.03, 0, 1, 10, ""), Estimate(1.0, 0.04, 0, 1, 90, "")
    >>> print(micro_mean({"a": half, "b": whole}))
    0.9500 ± 0.0361 [0.8792, 1.0208]
    """
    return _weighted(tasks, {name: task.n for name, task in tasks.items()}, level, "micro")


def _weighted(tasks: Mapping[str, Estimate], weights: Mapping[str, int], level: float, name: str) -> Estimate:
    check_level(level)
    total = sum(weights.values())
    if not total:
        raise ConfigError("tasks: got none with a question, expected at least one")
    value = math.fsum(weights[task] * estimate.value for task, estimate in tasks.items()) / total
    stderr = math.sqrt(math.fsum((weights[task] * estimate.stderr) ** 2 for task, estimate in tasks.items())) / total
    questions = sum(estimate.n for estimate in tasks.values())
    quantile = float(special.ndtri(0.5 + level / 2))
    return Estimate.symmetric(value, stderr, quantile, questions, f"{name} mean of {len(tasks)} tasks, normal")
