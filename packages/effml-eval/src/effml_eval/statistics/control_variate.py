"""A mean over few questions, sharpened by a cheap reference model that has answered many.

The target's scores y are known on Q questions, the reference's scores x on these and, beyond, its mean mu. With the
least-squares slope beta of y on x,

    estimate = ybar - beta (xbar - mu)        SE^2 = s_e^2 / Q + beta^2 SE_mu^2

s_e^2 being the residual variance with Q - 2: the correlation r of the two models takes a share r^2 off the variance.
SE_mu is 0 where mu is the mean over the very benchmark of interest, from which the Q questions were drawn at random.
The estimate is biased by O(1 / Q), since beta is estimated.

Cost: O(Q). The regression estimator of survey sampling; its use here is our own.
"""

from __future__ import annotations

import math

from effml_shared.checks import check_range
from effml_shared.errors import ConfigError
from numpy.typing import ArrayLike
from scipy import special

from effml_eval.statistics.estimate import Estimate
from effml_eval.statistics.scores import check_level, score_vector

__all__ = ["control_variate_mean"]


def control_variate_mean(
    scores: ArrayLike,
    reference: ArrayLike,
    reference_mean: float,
    *,
    reference_stderr: float = 0.0,
    level: float = 0.95,
) -> Estimate:
    """Estimate the mean of scores (questions,) with the help of a reference model's scores on the same questions.

    Args:
        scores: of the target, on a random choice of questions.
        reference: of the reference model on the same questions, in the same order.
        reference_mean: of the reference model over all questions.
        reference_stderr: of that mean, where it is itself an estimate for a wider population of questions.
        level: of the interval, Student's t with Q - 2 degrees of freedom.

    Raises:
        ConfigError: fewer than three questions, different lengths, or numbers that are not finite.

    >>> print(control_variate_mean([0, 1, 1, 0], [0, 1, 1, 0], reference_mean=0.7))
    0.7000 ± 0.0000 [0.7000, 0.7000]
    """
    y, x = score_vector("scores", scores), score_vector("reference", reference)
    if len(y) != len(x) or len(y) < 3:
        raise ConfigError(f"scores, reference: got {len(y)} and {len(x)}, expected the same three or more questions")
    if not math.isfinite(reference_mean):
        raise ConfigError(f"reference_mean: got {reference_mean}, expected a finite number")
    check_range("reference_stderr", reference_stderr, 0.0)
    check_level(level)
    centred = x - x.mean()
    spread = float(centred @ centred)
    slope = float(centred @ y) / spread if spread > 0 else 0.0
    residual = y - y.mean() - slope * centred
    variance = float(residual @ residual) / (len(y) - 2) / len(y) + (slope * reference_stderr) ** 2
    value = float(y.mean()) - slope * (float(x.mean()) - reference_mean)
    quantile = float(special.stdtrit(len(y) - 2, 0.5 + level / 2))
    return Estimate.symmetric(value, math.sqrt(variance), quantile, len(y), "control variate, t")
