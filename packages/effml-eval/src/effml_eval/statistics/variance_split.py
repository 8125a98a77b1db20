"""Where the variance of a mean comes from: the choice of questions, or the sampling of answers.

With K samples of each of Q questions, the mean of all scores has

    Var = (B + W / K) / Q       W = mean over questions of the variance of their samples (ddof 1)
                                B = max(0, variance of the question means - W / K)

so Q questions with ever more samples come no lower than sqrt(B / Q). At equal cost Q K, more questions never lose:
(B + W/K) / (f Q) <= (B + W/(f K)) / Q, since B / f <= B. More samples are for a benchmark that has no more questions.

Cost: O(Q K). Source: arXiv 2411.00640; the advice is derived here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from numpy.typing import ArrayLike

__all__ = ["VarianceSplit", "variance_split"]


@dataclass(frozen=True)
class VarianceSplit:
    """The variance of a mean over questions and samples.

    Attributes:
        mean: of all scores.
        within: W, variance of the samples of one question.
        between: B, variance of the questions' true scores.
        questions: Q.
        samples: K, of each question.
    """

    mean: float
    within: float
    between: float
    questions: int
    samples: int

    @property
    def stderr(self) -> float:
        """Standard error of the mean as measured."""
        return self.predicted_stderr()

    @property
    def floor(self) -> float:
        """Standard error that no number of samples gets below with these questions."""
        return math.sqrt(self.between / self.questions)

    def predicted_stderr(self, *, questions: int | None = None, samples: int | None = None) -> float:
        """Return the standard error to expect of another number of questions or of samples per question."""
        q = self.questions if questions is None else questions
        k = self.samples if samples is None else samples
        check_count("questions", q, 1)
        check_count("samples", k, 1)
        return math.sqrt((self.between + self.within / k) / q)

    def advice(self, factor: int = 4) -> str:
        """Say what `factor` times the cost buys as questions and as samples.

        >>> variance_split([[1, 1, 0, 1], [0, 0, 1, 0], [1, 1, 1, 1]]).advice()
        'standard error 0.2205; 4x questions: 0.1102; 4x samples: 0.1954, never below 0.1863'
        """
        check_count("factor", factor, 2)
        more_questions = self.predicted_stderr(questions=factor * self.questions)
        more_samples = self.predicted_stderr(samples=factor * self.samples)
        return (
            f"standard error {self.stderr:.4f}; {factor}x questions: {more_questions:.4f}; "
            f"{factor}x samples: {more_samples:.4f}, never below {self.floor:.4f}"
        )


def variance_split(scores: ArrayLike) -> VarianceSplit:
    """Split the variance of scores (questions, samples).

    Raises:
        ConfigError: fewer than two questions or samples, questions with different numbers of samples, or NaN.

    >>> split = variance_split([[1, 1, 0, 1], [0, 0, 1, 0], [1, 1, 1, 1]])
    >>> round(split.within, 6), round(split.between, 6), round(split.predicted_stderr(samples=1), 6)
    (0.166667, 0.104167, 0.300463)
    """
    try:
        y = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError):
        raise ConfigError("scores: got rows of different lengths, expected numbers (questions, samples)") from None
    if y.ndim != 2 or min(y.shape) < 2:
        raise ConfigError(f"scores: got shape {y.shape}, expected (questions, samples), two of each at least")
    if not np.isfinite(y).all():
        raise ConfigError("scores: got one that is not a finite number")
    within = float(y.var(axis=1, ddof=1).mean())
    between = max(0.0, float(y.mean(axis=1).var(ddof=1)) - within / y.shape[1])
    return VarianceSplit(float(y.mean()), within, between, *y.shape)
