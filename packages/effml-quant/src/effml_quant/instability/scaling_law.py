"""Scaling laws of the loss in parameters N and tokens D, fitted as language-model studies fit them.

    chinchilla   L = A N^-alpha + B D^-beta + E
    kaplan       L = ((A / N)^(alpha / beta) + B / D)^beta + E

Fitted are log A, log B, log E, alpha and beta, by the mean Huber loss of log L (delta 1e-3), with L-BFGS from every
start of a grid; the least wins. log L is the log-sum-exp of its terms, so nothing overflows, and the gradient is exact.
At C = 6 N D FLOPs the compute-optimal N grows as C^a; for both laws from the tangency of D N = const,

    chinchilla   a = beta / (alpha + beta)          kaplan   a = 1 / (1 + alpha / beta)

which are one formula. State: none. Cost: milliseconds per start; a bootstrap resample starts from the fit alone.

Source: Chinchilla's form and Huber fit: arXiv 2203.15556, section 3.3; Kaplan's form: arXiv 2001.08361, equation 1.5;
both applied to runs in block-scaled formats in arXiv 2506.20752. Whether points are weighted there is not known.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError
from numpy.typing import ArrayLike, NDArray

__all__ = ["ScalingLaw", "fit_scaling_law"]

Array = NDArray[np.float64]
NAMES = ("A", "B", "E", "alpha", "beta")
# Starts of log A, log B, log E, alpha, beta.
_STARTS: dict[str, list[Sequence[float]]] = {
    "chinchilla": [(0, 8, 16), (0, 8, 16), (-1, 0.5), (0.3, 0.6), (0.3, 0.6)],
    "kaplan": [(10, 20, 30), (10, 20, 30), (-1, 0.5), (0.1, 0.4), (0.1, 0.4)],
}


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted law.

    Attributes:
        form: `"chinchilla"` or `"kaplan"`.
        A, B, E, alpha, beta: of the form. E = 0 where the data ask for no floor.
        loss: mean Huber loss of log L at the fit.
        intervals: 95% percentile intervals from the bootstrap, for each parameter and for `optimal`; empty without one.
    """

    form: str
    A: float
    B: float
    E: float
    alpha: float
    beta: float
    loss: float
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def optimal(self) -> float:
        """Exponent a of the compute-optimal number of parameters, N = G C^a."""
        return self.beta / (self.alpha + self.beta)

    def predict(self, parameters: ArrayLike, tokens: ArrayLike) -> Array:
        """Return the loss at N parameters and D tokens, broadcast.

        >>> law = ScalingLaw("chinchilla", A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28, loss=0.0)
        >>> round(float(law.predict(70e9, 1.4e12)), 3)
        1.937
        """
        n, d = np.asarray(parameters, np.float64), np.asarray(tokens, np.float64)
        if self.form == "chinchilla":
            return self.A * n**-self.alpha + self.B * d**-self.beta + self.E
        return ((self.A / n) ** (self.alpha / self.beta) + self.B / d) ** self.beta + self.E


def fit_scaling_law(
    parameters: ArrayLike,
    tokens: ArrayLike,
    losses: ArrayLike,
    *,
    form: str = "chinchilla",
    delta: float = 1e-3,
    iterations: int = 200,
    starts: int | None = None,
    bootstrap: int = 0,
    seed: int = 0,
) -> ScalingLaw:
    """Fit a law to trained models.

    Args:
        parameters: N of each, (models).
        tokens: D of each, (models).
        losses: of each, in nats, (models).
        form: `"chinchilla"` or `"kaplan"`.
        delta: residual of log L at which the Huber loss turns linear.
        iterations: of L-BFGS, per start.
        starts: how many points of the grid, drawn at random; None: all 72.
        bootstrap: resamples of the models, for intervals. 0: none.
        seed: of starts and resamples.

    Raises:
        ConfigError: lengths differ, there are fewer than six models, or a number is not positive and finite.
    """
    check_choice("form", form, _STARTS)
    check_range("delta", delta, 1e-300)
    check_count("iterations", iterations, 1)
    check_count("bootstrap", bootstrap, 0)
    n, d, loss = (
        np.log(_positive(name, v))
        for name, v in zip(("parameters", "tokens", "losses"), (parameters, tokens, losses), strict=True)
    )
    if not len(n) == len(d) == len(loss) or len(n) < len(NAMES) + 1:
        raise ConfigError(f"losses: got {len(n)}, {len(d)}, {len(loss)} numbers, expected as many of each, at least 6")
    grid = list(itertools.product(*_STARTS[form]))
    rng = np.random.default_rng(seed)
    if starts is not None:
        check_count("starts", starts, 1)
        grid = [grid[i] for i in rng.permutation(len(grid))[:starts]]
    terms = _chinchilla if form == "chinchilla" else _kaplan

    def fit(rows: Any, grid: Sequence[Sequence[float]]) -> tuple[float, Array]:
        return min(
            (_minimise(terms, n[rows], d[rows], loss[rows], start, delta, iterations) for start in grid),
            key=lambda f: f[0],
        )

    value, best = fit(slice(None), grid)
    law = _law(form, best, value)
    if not bootstrap:
        return law
    resampled = [_law(form, fit(rng.integers(len(n), size=len(n)), [best.tolist()])[1], 0.0) for _ in range(bootstrap)]
    quantiles = {
        name: np.quantile([getattr(r, name) for r in resampled], (0.025, 0.975)) for name in (*NAMES, "optimal")
    }
    intervals = {name: (float(low), float(high)) for name, (low, high) in quantiles.items()}
    return _law(form, best, value, intervals)


def _law(form: str, theta: Array, loss: float, intervals: dict[str, tuple[float, float]] | None = None) -> ScalingLaw:
    a, b, e, alpha, beta = (float(x) for x in theta)
    return ScalingLaw(form, math.exp(a), math.exp(b), math.exp(e), alpha, beta, loss, intervals or {})


def _positive(name: str, values: ArrayLike) -> Array:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or not np.all(np.isfinite(array) & (array > 0)):
        raise ConfigError(f"{name}: got {values!r:.80}, expected a list of finite numbers > 0")
    return array


Terms = Callable[[Array, Array, Array], tuple[Array, Array]]


def _chinchilla(theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    """Return log L, (models), and its gradient in theta, (models, 5)."""
    a, b, e, alpha, beta = theta
    logs = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
    total, share = _log_sum_exp(logs)
    return total, np.stack([share[0], share[1], share[2], -n * share[0], -d * share[1]], axis=-1)


def _kaplan(theta: Array, n: Array, d: Array) -> tuple[Array, Array]:
    a, b, e, alpha, beta = theta
    ratio = alpha / beta
    inner, part = _log_sum_exp(np.stack([ratio * (a - n), b - d]))
    total, share = _log_sum_exp(np.stack([beta * inner, np.full_like(n, e)]))
    by_alpha = part[0] * (a - n)  # beta d inner / d alpha
    by_beta = inner - part[0] * ratio * (a - n)  # inner + beta d inner / d beta
    gradient = np.stack([part[0] * alpha, part[1] * beta, np.zeros_like(n), by_alpha, by_beta], axis=-1)
    gradient *= share[0][:, None]
    gradient[:, 2] = share[1]
    return total, gradient


def _log_sum_exp(logs: Array) -> tuple[Array, Array]:
    """Return log sum exp over the first axis, and each term's share."""
    top = logs.max(axis=0)
    terms = np.exp(logs - top)
    total = terms.sum(axis=0)
    return top + np.log(total), terms / total


def _minimise(
    terms: Terms, n: Array, d: Array, loss: Array, start: Sequence[float], delta: float, iterations: int
) -> tuple[float, Array]:
    from scipy.optimize import minimize

    def objective(theta: Array) -> tuple[float, Array]:
        predicted, gradient = terms(theta, n, d)
        residual = predicted - loss
        small = np.abs(residual) <= delta
        huber = np.where(small, 0.5 * residual**2, delta * (np.abs(residual) - 0.5 * delta))
        slope = np.clip(residual, -delta, delta)
        # In units of delta^2: at its own size, some 1e-6, L-BFGS would stop at once.
        return float(huber.mean()) / delta**2, gradient.T @ slope / len(loss) / delta**2

    bounds = [(-50, 200), (-50, 200), (-30, 10), (1e-3, 5), (1e-3, 5)]  # exponents below 0 mean nothing
    options = {"maxiter": iterations, "maxfun": 20 * iterations, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20}
    found = minimize(
        objective, np.asarray(start, np.float64), jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )
    return float(found.fun) * delta**2, found.x
