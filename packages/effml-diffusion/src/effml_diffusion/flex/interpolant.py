"""The interpolant between the empty text and the data: when tokens appear as masks, and when they are revealed.

Flow time t: 0 is empty, 1 is data. Two schedules rise from 0 to 1, a(t) of insertion and b(t) of unmasking. Every token
of a text draws two times, independently of the others:

    T1 ~ a                    absent before T1
    T2 ~ b given T2 >= T1     a mask from T1 to T2, itself from T2 on

    P(absent) = 1 - a(t)      P(mask) = (1 - b(t)) int_0^t a'(s) / (1 - b(s)) ds      P(clean) = a(t) - P(mask)

With h = a' / (1 - a) the rate at which what is absent appears, and the same for b, these are the weights of the loss
and the rates of the generating Markov chain; a step from t to s has the probability (a(s) - a(t)) / (1 - a(t)).

A schedule is one of masked diffusion read backwards, a(t) = alpha(1 - t): the paper's `sin` is our `cosine`, its
`cosine` our `cosine_dllm`, its t^n our `polynomial(n)`. Schedules that reach neither 0 nor 1 (geometric) have their
times clamped to [0, 1]: some tokens are there from the start, and some appear at the very end.

No state; float64 throughout. Source: arXiv 2509.01025 and its code; `state_probabilities` in general is derived here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from effml_diffusion.corruption import uniform
from effml_diffusion.schedules import Schedule, schedule

__all__ = ["FlowSchedule", "Interpolant", "gauss_legendre"]


@dataclass(frozen=True)
class FlowSchedule:
    """A schedule of masked diffusion in flow time: a(t) = alpha(1 - t), from 0 to 1. Times are tensors of any shape.

    >>> FlowSchedule(schedule("linear")).hazard(torch.tensor(0.5), torch.tensor(0.75)).item()
    0.5
    """

    schedule: Schedule

    def value(self, t: Tensor) -> Tensor:
        """Return a(t)."""
        return self.schedule.alpha(1 - t.double())

    def rest(self, t: Tensor) -> Tensor:
        """Return 1 - a(t), accurate where it is small."""
        return self.schedule.mask_level(1 - t.double())

    def rate(self, t: Tensor) -> Tensor:
        """Return a'(t) / (1 - a(t)); infinite at t = 1 where a reaches 1."""
        return self.schedule.weight(1 - t.double())

    def hazard(self, t: Tensor, s: Tensor) -> Tensor:
        """Return (a(s) - a(t)) / (1 - a(t)): the probability that what has not happened by t happens by s >= t."""
        return self.schedule.hazard(1 - t.double(), 1 - s.double())

    def inverse(self, u: Tensor) -> Tensor:
        """Return the t in [0, 1] at which a is u, or comes closest to it."""
        return 1 - self.schedule.inverse(u.double())

    def inverse_after(self, start: Tensor, u: Tensor) -> Tensor:
        """Return the time in [start, 1] before which a share u of what has not happened by `start` happens."""
        a = self.value(start)
        return torch.maximum(self.inverse(a + (1 - a) * u.double()), start.double())

    @property
    def complete(self) -> bool:
        """Whether a starts at 0 and ends at 1, to 1e-6, so that generation loses no token."""
        first, last = self.schedule.alpha(1.0), self.schedule.alpha(0.0)
        return first < 1e-6 and last > 1 - 1e-6


@dataclass(frozen=True)
class Interpolant:
    """A schedule of insertion and one of unmasking, both in flow time.

    >>> Interpolant.of("linear", "linear").state_probabilities(torch.tensor(0.5))
    tensor([0.5000, 0.3466, 0.1534], dtype=torch.float64)
    """

    insert: FlowSchedule
    unmask: FlowSchedule

    @classmethod
    def of(cls, insert: str | Schedule, unmask: str | Schedule) -> Interpolant:
        """Build one from two schedules of masked diffusion, or their names."""
        return cls(FlowSchedule(schedule(insert)), FlowSchedule(schedule(unmask)))

    def hitting_times(
        self, shape: Sequence[int], *, device: torch.device | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw (T1, T2), each of the given shape, with T1 <= T2."""
        u = uniform((2, *shape), device or torch.device("cpu"), generator)
        appears = self.insert.inverse(u[0])
        return appears, self.unmask.inverse_after(appears, u[1])

    def state_probabilities(self, t: Tensor) -> Tensor:
        """Return P(absent), P(mask), P(clean) of a token at t, (..., 3).

        The integral runs over y in [0, 1] with 1 - s = (1 - t)^y, which takes the singularity out of a' / (1 - b).
        """
        nodes, weights = (x.to(t.device) for x in gauss_legendre(64))
        left = (1 - t.double()).clamp(1e-12, 1 - 1e-15).unsqueeze(-1)  # rates may be infinite at both ends
        s = 1 - left**nodes
        density = self.insert.rate(s) * self.insert.rest(s) / self.unmask.rest(s)
        ds = -left.log() * left**nodes
        start = self.insert.value(torch.zeros_like(t, dtype=torch.float64))  # there from the start
        start = start / self.unmask.rest(torch.zeros_like(start))
        mask = self.unmask.rest(t) * (start + (density * ds * weights).sum(-1))
        present = self.insert.value(t)
        return torch.stack([1 - present, mask, present - mask], dim=-1)


@lru_cache(maxsize=8)
def gauss_legendre(count: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights (count,) of Gauss-Legendre quadrature on [0, 1], float64 on the CPU.

    They are the eigenvalues of the Legendre polynomials' three-term recurrence and the squared heads of its
    eigenvectors.
    """
    k = torch.arange(1, count, dtype=torch.float64)
    off = k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (nodes + 1) / 2, vectors[0].square()
