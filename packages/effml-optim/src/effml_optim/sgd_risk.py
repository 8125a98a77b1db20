"""The exact expected risk of mini-batch SGD on linear regression, for any schedule of learning rate and batch.

    w' = w - (lr / B) sum_b x_b (<x_b, w> - y_b),     x ~ N(0, H),  y = <x, w*> + e,  e ~ N(0, sigma2), fresh samples

In the eigenbasis of H (eigenvalues lambda) the risk sees only m_i = E <q_i, w - w*>^2, and these obey, exactly,

    m_i' = m_i (1 - 2 lr lambda_i + (1 + 1/B) lr^2 lambda_i^2) + (lr^2 / B) lambda_i (S + sigma2),     S = <lambda, m>

The loss carries a factor 1/2, so the excess risk is S / 2 and the risk (S + sigma2) / 2. Of one gradient,

    E||g||^2 = M + V / B,     M = <lambda^2, m>,     V = M + (S + sigma2) tr H

with M the squared norm of its mean and V the variance of one sample's gradient: normalised SGD divides lr by the root
of this *expectation* (not by the norm that a step happens to draw), V / M is the critical batch, and (V / B) / E||g||^2
the share of the variance. No sampling and no approximation; only for one pass over Gaussian inputs.

State: m, 8 bytes per eigenvalue. Cost: about 10 flops per eigenvalue and step, in float64: float32 loses the tail of a
wide spectrum.

Source: arXiv 2506.15535 has the recursion for B = 1; any B follows from the same Gaussian fourth moment (derived here).
Normalised SGD as a proxy of Adam: arXiv 2510.14717, Corollary 1; its E||g||^2 in full is derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from effml_shared.errors import ConfigError
from effml_shared.schedules import Plan
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from effml_optim.seesaw.plan import SeesawPlan

__all__ = ["GradientMoments", "Problem", "RiskCurve", "gradient_moments", "predict_linear", "risk_curve"]

Vector = NDArray[np.float64]
PerStep = float | ArrayLike | Callable[[int], float]
"""A number, one number per step, or a function of the step's index, which counts from 0."""

_DIVERGED = 1e12  # growth of S + sigma2 that no run comes back from


class Problem:
    """A linear regression in the eigenbasis of its input covariance.

    Args:
        eigvals: (d,), of the covariance, in any order.
        sigma2: variance of the label noise.
        delta0: (d,), first weights minus optimal ones in the eigenbasis; or
        m0: (d,), their expected squares, for random first weights.

    Raises:
        ConfigError: a shape is wrong, a number is negative or not finite, or not exactly one of delta0 and m0 is given.

    >>> Problem([1.0, 0.25], sigma2=0.5, delta0=[1.0, -2.0]).m0
    array([1., 4.])
    """

    def __init__(
        self, eigvals: ArrayLike, sigma2: float, delta0: ArrayLike | None = None, *, m0: ArrayLike | None = None
    ) -> None:
        values = _vector("eigvals", eigvals)
        if values.size == 0 or values.min() < -1e-12 * values.max():
            raise ConfigError(f"eigvals: got {values}, expected one or more numbers >= 0")
        if not 0 <= sigma2 < math.inf:
            raise ConfigError(f"sigma2: got {sigma2}, expected a finite number >= 0")
        if (delta0 is None) == (m0 is None):
            raise ConfigError(f"delta0, m0: got {'neither' if m0 is None else 'both'}, expected exactly one")
        self.eigvals = values.clip(min=0.0)  # what an eigensolver leaves of a zero
        self.sigma2 = float(sigma2)
        self.m0 = _vector("m0", m0) if m0 is not None else _vector("delta0", delta0) ** 2
        if self.m0.shape != values.shape or self.m0.min() < 0:
            raise ConfigError(f"m0: got {self.m0} for {values.size} eigvals, expected as many numbers >= 0")
        self.squares = self.eigvals**2
        self.trace = float(self.eigvals.sum())

    @classmethod
    def power_law(cls, d: int, a: float, sigma2: float, b: float | None = None) -> Problem:
        """Return eigenvalues i^-a for i = 1..d, and lambda_i m0_i = i^-b (m0 = 1 where b is None)."""
        if d < 1:
            raise ConfigError(f"d: got {d}, expected an integer >= 1")
        index = np.arange(1, d + 1, dtype=np.float64)
        return cls(index**-a, sigma2, m0=np.ones(d) if b is None else index ** (a - b))


@dataclass(frozen=True)
class RiskCurve:
    """Expected risk along training, at recorded steps; step 0 is before the first update.

    A diverging curve ends at the step where that showed, with an infinite risk.

    Attributes:
        steps: (records,), updates made.
        samples: (records,), samples consumed.
        excess: (records,), excess risk, half of E||w - w*||^2 in the norm of the covariance.
        risk: (records,), the same plus sigma2 / 2.
        variance_share: (records,), of the gradient's second moment, at the batch of the step to come (at the end: of
            the last one).
        critical_batch: (records,), samples at which that share is one half.
        m: (d,), expected squared errors after the last step.
        diverged_at: the step at which S stopped being a number of reasonable size, or None.
    """

    steps: NDArray[np.int64]
    samples: Vector
    excess: Vector
    risk: Vector
    variance_share: Vector
    critical_batch: Vector
    m: Vector
    diverged_at: int | None


class GradientMoments(NamedTuple):
    """Of what the gradient at an iterate is made: `signal` S, `mean` M and `variance` V, as the module has them."""

    signal: float
    mean: float
    variance: float

    def second_moment(self, batch: float) -> float:
        """Return E||g||^2 of a mini-batch gradient."""
        return self.mean + self.variance / batch

    def variance_share(self, batch: float) -> float:
        """Return the part of E||g||^2 that is variance; NaN where there is no gradient at all."""
        second = self.second_moment(batch)
        return self.variance / batch / second if second > 0 else math.nan

    @property
    def critical_batch(self) -> float:
        """Samples at which mean and variance are equal parts of E||g||^2: it grows as training converges."""
        return self.variance / self.mean if self.mean > 0 else math.inf


def gradient_moments(problem: Problem, m: Vector) -> GradientMoments:
    """Take the gradient apart at expected squared errors m, (d,).

    >>> problem = Problem([1.0, 0.25], sigma2=0.5, m0=[1.0, 4.0])
    >>> gradient_moments(problem, problem.m0), gradient_moments(problem, problem.m0).critical_batch
    (GradientMoments(signal=2.0, mean=1.25, variance=4.375), 3.5)
    """
    signal, mean = float(problem.eigvals @ m), float(problem.squares @ m)
    return GradientMoments(signal, mean, mean + (signal + problem.sigma2) * problem.trace)


def risk_curve(
    problem: Problem,
    lr: PerStep,
    batch: PerStep = 1,
    steps: int | None = None,
    *,
    normalized: bool = False,
    record: str | int | Sequence[int] = "all",
) -> RiskCurve:
    """Follow the expected risk of SGD through training.

    Args:
        problem: what is learned.
        lr: step size, >= 0.
        batch: samples per step, >= 1. It may be fractional, which no real run can be, and infinite: gradient descent.
        steps: number of updates; may be left out where lr or batch is an array of that length.
        normalized: divide lr by the root of E||g||^2.
        record: `"all"` steps, or every so many and the last, or a list of steps.

    Raises:
        ConfigError: lr, batch, steps or record is out of its range, or two of them disagree.

    >>> problem = Problem([1.0, 0.25], sigma2=0.5, m0=[1.0, 4.0])
    >>> risk_curve(problem, lr=0.2, steps=3).risk.round(6)
    array([1.25    , 1.095625, 0.974105, 0.877184])
    """
    total = _count_steps(steps, lr, batch)
    lrs, batches = _per_step("lr", lr, total, 0.0), _per_step("batch", batch, total, 1.0)
    wanted = _recorded(record, total)
    eigvals, sigma2, m = problem.eigvals, problem.sigma2, problem.m0
    limit = _DIVERGED * (float(eigvals @ m) + sigma2)
    rows: list[tuple[float, ...]] = []
    samples, diverged_at = 0.0, None
    with np.errstate(over="ignore", invalid="ignore"):  # the guard below judges what overflowed
        for step in range(total + 1):
            size = batches[min(step, total - 1)]
            moments = gradient_moments(problem, m)
            if not moments.signal <= limit:  # NaN too
                rows.append((step, samples, math.inf, math.nan, math.nan))
                diverged_at = step
                break
            if step in wanted:
                shares = moments.variance_share(size), moments.critical_batch
                rows.append((step, samples, moments.signal / 2, *shares))
            if step == total:
                break
            eta = lrs[step]
            if normalized and moments.second_moment(size) > 0:
                eta /= math.sqrt(moments.second_moment(size))
            noise = eta * eta / size * (moments.signal + sigma2)
            m = m * (1 - eta * eigvals * (2 - (1 + 1 / size) * eta * eigvals)) + noise * eigvals
            samples += size
    at, consumed, excess, share, critical = np.array(rows).T
    return RiskCurve(at.astype(np.int64), consumed, excess, excess + sigma2 / 2, share, critical, m, diverged_at)


def predict_linear(plan: SeesawPlan, problem: Problem, lr: float, *, normalized: bool = True) -> RiskCurve:
    """Return the exact risk that a plan leads to on a linear regression, step by step.

    Args:
        plan: gives each step's batch and the factor of its learning rate.
        problem: a stand-in for the real one, such as a power law.
        lr: step size at factor 1; of normalised SGD, the stand-in for Adam, or of plain SGD where not `normalized`.
    """
    steps: list[Plan] = []
    samples = 0
    while samples < plan.total:
        steps.append(plan.at(samples))
        samples += steps[-1].batch_size
    lrs, batches = [lr * step.lr_factor for step in steps], [step.batch_size for step in steps]
    return risk_curve(problem, lrs, batches, normalized=normalized)


def _vector(name: str, values: ArrayLike | None) -> Vector:
    vector = np.array(values, dtype=np.float64)
    if vector.ndim != 1 or not np.isfinite(vector).all():
        raise ConfigError(f"{name}: got {values!r}, expected a vector of finite numbers")
    return vector


def _count_steps(steps: int | None, *schedules: PerStep) -> int:
    lengths = {np.size(values) for values in schedules if not callable(values) and np.ndim(values)}
    lengths |= set() if steps is None else {steps}
    if len(lengths) != 1 or min(lengths) < 1:
        got = " and ".join(map(str, sorted(lengths))) or "neither steps nor an array"
        raise ConfigError(f"steps: got {got}, expected one number >= 1 and arrays of that length")
    return lengths.pop()


def _per_step(name: str, values: PerStep, total: int, least: float) -> list[float]:
    given = [values(step) for step in range(total)] if callable(values) else values
    numbers = np.broadcast_to(np.asarray(given, np.float64), total)
    if wrong := numbers[~(numbers >= least)].tolist():
        raise ConfigError(f"{name}: got {wrong[0]}, expected numbers >= {least:g}")
    return numbers.tolist()


def _recorded(record: str | int | Sequence[int], total: int) -> Container[int]:
    if record == "all":
        return range(total + 1)
    if isinstance(record, int) and record >= 1:
        return {*range(0, total, record), total}
    if isinstance(record, str | int) or not record or not all(0 <= step <= total for step in record):
        raise ConfigError(f"record: got {record!r}, expected 'all', a number >= 1 or steps in [0, {total}]")
    return set(record)
