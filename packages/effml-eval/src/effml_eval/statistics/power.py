"""How many questions a paired comparison needs.

    Q = (z_{1 - alpha/2} + z_power)^2 sigma_d^2 / delta^2

for a two-sided test at level alpha to find a mean difference delta with the given probability, sigma_d^2 being the
variance of the difference per question. Source: arXiv 2411.00640.
"""

from __future__ import annotations

import math

from effml_shared.errors import ConfigError
from scipy import special

__all__ = ["power_questions"]


def power_questions(delta: float, variance: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Return how many questions show a mean difference of `delta`.

    Args:
        delta: difference to be found, in units of the score.
        variance: of the paired difference per question, as of a pilot run.
        alpha: level of the two-sided test.
        power: probability to find it.

    Raises:
        ConfigError: delta is 0, the variance negative, or a probability outside (0, 1).

    >>> power_questions(0.03, 0.25)
    2181
    """
    if not (math.isfinite(delta) and delta != 0):
        raise ConfigError(f"delta: got {delta}, expected a difference other than 0")
    if not 0 <= variance < math.inf:
        raise ConfigError(f"variance: got {variance}, expected a number in [0, inf)")
    for name, value in (("alpha", alpha), ("power", power)):
        if not 0 < value < 1:
            raise ConfigError(f"{name}: got {value}, expected a number between 0 and 1")
    z = float(special.ndtri(1 - alpha / 2) + special.ndtri(power))
    return max(2, math.ceil(z * z * variance / delta**2))
