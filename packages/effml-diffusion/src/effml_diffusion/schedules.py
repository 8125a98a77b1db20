"""Masking schedules: how many tokens are still clean at time t, and what a masked token weighs in the loss there.

Time is diffusion time: t = 0 is the data, t = 1 all masks. A token is clean with probability alpha(t), independently of
the others, and masked with probability `mask_level(t)` = 1 - alpha(t).

    weight(t) = -alpha'(t) / (1 - alpha(t))            of the cross-entropy in the likelihood bound
    hazard(t, s) = (alpha(s) - alpha(t)) / (1 - alpha(t))     P(clean at s < t | masked at t)

| name                         | alpha(t)                                  | weight(t)                         |
|------------------------------|-------------------------------------------|-----------------------------------|
| linear, loglinear(eps)       | 1 - t, 1 - (1 - eps) t                    | 1 / t                             |
| cosine, cosine(eps)          | eps + (1 - eps) cos(pi t / 2)             | (pi / 2) cot(pi t / 4)            |
| cosine_dllm                  | 1 - cos(pi (1 - t) / 2)                   | (pi / 2) cot(pi t / 2)            |
| polynomial(n)                | (1 - t)^n                                 | n (1 - t)^(n-1) / (1 - (1 - t)^n) |
| polynomial_mask(n)           | 1 - t^n                                   | n / t                             |
| geometric(m, M)              | exp(-sigma), sigma = m^(1 - t) M^t        | sigma ln(M / m) / expm1(sigma)    |

A change of variable shows that the bound is the same for every schedule whose alpha runs from 1 to 0; what changes is
the gradient's variance and a sampler's grid. With alpha(1) = eps > 0 the levels above 1 - eps are missing and the bound
reads low by about eps sum_i CE(x_i). An eps cancels in the weight.

No state. Everything is computed in float64, in closed forms that neither divide 0 by 0 nor cancel near the ends.
Source: arXiv 2406.07524 (MDLM) and its code. FlexMDM (2509.01025) counts time the other way, a(t) = alpha(1 - t): its
`sin` is `cosine` here, its `cosine` is `cosine_dllm`, its t^n is `polynomial(n)` and its geometric(M, m) has the same
name with its numbers in the other order.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from effml_shared.checks import check_range
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_diffusion.value_checks import check_values

__all__ = ["Cosine", "CosineDllm", "Geometric", "Polynomial", "PolynomialMask", "Schedule", "schedule"]

Value = TypeVar("Value", float, Tensor)
"""A number, or a tensor of any shape and real dtype: the result is a number, or a float64 tensor of that shape."""


class Schedule(ABC):
    """A masking schedule in diffusion time. A subclass gives the formulas for eps = 0 on float64 tensors.

    Every method raises a `ConfigError` for arguments outside [0, 1] (in tensors: where they are on a CPU).

    >>> cosine = schedule("cosine")
    >>> round(cosine.alpha(0.5), 4), round(cosine.inverse(0.7071), 3), schedule("linear").weight(0.25)
    (0.7071, 0.5, 4.0)
    """

    eps: float = 0.0  # alpha(1)

    def alpha(self, t: Value) -> Value:
        """Return the probability that a token is clean at t."""
        return _lift(lambda t: self.eps + (1 - self.eps) * self._alpha(t), t=t)

    def mask_level(self, t: Value) -> Value:
        """Return 1 - alpha(t), accurate where it is small."""
        return _lift(lambda t: (1 - self.eps) * self._level(t), t=t)

    def dalpha(self, t: Value) -> Value:
        """Return the derivative of alpha at t, never positive."""
        return _lift(lambda t: (1 - self.eps) * self._dalpha(t), t=t)

    def weight(self, t: Value) -> Value:
        """Return -alpha'(t) / (1 - alpha(t)); at t = 0 it is infinite where no token is masked there."""
        return _lift(self._weight, t=t)

    def inverse(self, a: Value) -> Value:
        """Return the t in [0, 1] at which alpha is a, or comes closest to it."""
        return _lift(lambda a: self._inverse(((a - self.eps) / (1 - self.eps)).clamp(0, 1)).clamp(0, 1), a=a)

    def hazard(self, t: Value, s: Value) -> Value:
        """Return the probability that a token masked at t is clean at s <= t; 1 where no token is masked at t."""

        def formula(t: Tensor, s: Tensor) -> Tensor:
            check_values("s", s, s <= t, "a time no later than t")
            now, then = self._level(t), self._level(s)
            return torch.where(now > 0, (now - then) / now.where(now > 0, 1.0), 1.0)

        return _lift(formula, t=t, s=s)

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _level(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _dalpha(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _weight(self, t: Tensor) -> Tensor: ...

    @abstractmethod
    def _inverse(self, a: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PolynomialMask(Schedule):
    """1 - alpha = t^n, times 1 - eps; n = 1 is the linear schedule, log-linear in MDLM's words."""

    n: float = 1.0
    eps: float = 0.0

    def __post_init__(self) -> None:
        _check_positive("n", self.n)
        check_range("eps", self.eps, 0.0, 1.0)

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t**self.n

    def _level(self, t: Tensor) -> Tensor:
        return t**self.n

    def _dalpha(self, t: Tensor) -> Tensor:
        return -self.n * t ** (self.n - 1)

    def _weight(self, t: Tensor) -> Tensor:
        return self.n / t

    def _inverse(self, a: Tensor) -> Tensor:
        return (1 - a) ** (1 / self.n)


@dataclass(frozen=True)
class Polynomial(Schedule):
    """alpha = (1 - t)^n."""

    n: float

    def __post_init__(self) -> None:
        _check_positive("n", self.n)

    def _alpha(self, t: Tensor) -> Tensor:
        return (1 - t) ** self.n

    def _level(self, t: Tensor) -> Tensor:
        return -torch.expm1(self.n * torch.log1p(-t))

    def _dalpha(self, t: Tensor) -> Tensor:
        return -self.n * (1 - t) ** (self.n - 1)

    def _weight(self, t: Tensor) -> Tensor:
        return -self._dalpha(t) / self._level(t)

    def _inverse(self, a: Tensor) -> Tensor:
        return -torch.expm1(a.log() / self.n)


@dataclass(frozen=True)
class Cosine(Schedule):
    """alpha = cos(pi t / 2), times 1 - eps, plus eps: the cosine schedule of MDLM."""

    eps: float = 0.0

    def __post_init__(self) -> None:
        check_range("eps", self.eps, 0.0, 1.0)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * (1 - t))  # exactly 0 at t = 1

    def _level(self, t: Tensor) -> Tensor:
        return 2 * torch.sin(0.25 * math.pi * t).square()

    def _dalpha(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * torch.sin(0.5 * math.pi * t)

    def _weight(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi / torch.tan(0.25 * math.pi * t)

    def _inverse(self, a: Tensor) -> Tensor:
        return torch.acos(a) * (2 / math.pi)


@dataclass(frozen=True)
class CosineDllm(Schedule):
    """1 - alpha = sin(pi t / 2): the cosine schedule of dllm."""

    def _alpha(self, t: Tensor) -> Tensor:
        return 2 * torch.sin(0.25 * math.pi * (1 - t)).square()

    def _level(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def _dalpha(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * torch.sin(0.5 * math.pi * (1 - t))

    def _weight(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi / torch.tan(0.5 * math.pi * t)

    def _inverse(self, a: Tensor) -> Tensor:
        return torch.asin(1 - a) * (2 / math.pi)


@dataclass(frozen=True)
class Geometric(Schedule):
    """alpha = exp(-sigma) with sigma from m at t = 0 to M at t = 1; reaches neither 1 nor 0."""

    m: float
    M: float

    def __post_init__(self) -> None:
        if not 0 < self.m < self.M < math.inf:
            raise ConfigError(f"geometric: got m={self.m} and M={self.M}, expected 0 < m < M")

    def _sigma(self, t: Tensor) -> Tensor:
        return torch.exp((1 - t) * math.log(self.m) + t * math.log(self.M))

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self._sigma(t))

    def _level(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._sigma(t))

    def _dalpha(self, t: Tensor) -> Tensor:
        sigma = self._sigma(t)
        return -sigma * math.log(self.M / self.m) * torch.exp(-sigma)

    def _weight(self, t: Tensor) -> Tensor:
        sigma = self._sigma(t)
        return sigma * math.log(self.M / self.m) / torch.expm1(sigma)

    def _inverse(self, a: Tensor) -> Tensor:
        return (torch.log(-torch.log(a)) - math.log(self.m)) / math.log(self.M / self.m)


_FORMS: dict[str, tuple[int, Callable[..., Schedule]]] = {
    "linear": (0, PolynomialMask),
    "loglinear(eps)": (1, lambda eps: PolynomialMask(1.0, eps)),
    "cosine": (0, Cosine),
    "cosine(eps)": (1, Cosine),
    "cosine_dllm": (0, CosineDllm),
    "polynomial(n)": (1, Polynomial),
    "polynomial_mask(n)": (1, PolynomialMask),
    "geometric(m, M)": (2, Geometric),
}


def schedule(name: str | Schedule) -> Schedule:
    """Return the schedule of a name from the table above, with numbers in place of letters; pass a schedule on.

    Raises:
        ConfigError: there is no such name, or its numbers are too few, too many or out of range.

    >>> schedule("geometric(1e-5, 20)")
    Geometric(m=1e-05, M=20.0)
    """
    if isinstance(name, Schedule):
        return name
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", name) if isinstance(name, str) else None
    words = match[2].split(",") if match and match[2] else []
    for form, (count, make) in _FORMS.items():
        if match and match[1] == form.partition("(")[0] and len(words) == count:
            try:
                numbers = [float(word) for word in words]
            except ValueError:
                break
            return make(*numbers)
    raise ConfigError(f"schedule: got {name!r}, expected a Schedule or one of {', '.join(_FORMS)}")


def _lift(formula: Callable[..., Tensor], **values: Value) -> Value:
    """Apply a formula for float64 tensors to numbers or tensors in [0, 1], the keywords being their names."""
    tensors = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in values.items()}
    for name, x in tensors.items():
        check_values(name, x, (x >= 0) & (x <= 1), "numbers in [0, 1]")
    result: Any = formula(**tensors)
    return result if any(isinstance(value, Tensor) for value in values.values()) else result.item()


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name}: got {value}, expected a finite number > 0")
