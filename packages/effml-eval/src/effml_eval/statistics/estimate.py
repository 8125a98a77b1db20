"""A measured number with its uncertainty: what every aggregate of an evaluation is."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Estimate"]


@dataclass(frozen=True)
class Estimate:
    """A number, its standard error and a confidence interval.

    Attributes:
        value: the estimate.
        stderr: its standard error, in the same unit; NaN where there is only one independent unit.
        ci_low: lower end of the interval, -inf where there is only one independent unit.
        ci_high: upper end.
        n: questions (or documents) it rests on.
        method: how the interval was made, such as `"normal"` or `"bootstrap bca, clustered"`.

    >>> print(Estimate(0.7, 0.1528, 0.4006, 0.9994, 10, "normal"))
    0.7000 ± 0.1528 [0.4006, 0.9994]
    """

    value: float
    stderr: float
    ci_low: float
    ci_high: float
    n: int
    method: str

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.stderr:.4f} [{self.ci_low:.4f}, {self.ci_high:.4f}]"

    @classmethod
    def symmetric(cls, value: float, stderr: float, quantile: float, n: int, method: str) -> Estimate:
        """Make the interval value ± quantile * stderr; an unknown standard error (NaN) has an infinite one."""
        half = math.inf if math.isnan(stderr) else quantile * stderr
        return cls(value, stderr, value - half, value + half, n, method)
