"""Least-squares problems in the weights alone, many at once: where quantised training can be judged without data.

    quadratic          L = 1/2 sum_i h_i (w_i - w*_i)^2,  h_i = i^-p,  w* ~ N(0, 1)           curvature h
    two linear layers  L = 1/2 sum_i h_i (W2 W1 - w*)_i^2, W1 (k, d), W2 (1, k)                Gauss-Newton, see below

Both are least squares on inputs with a power-law spectrum h, in expectation. Seeds are rows of one parameter with one
scale per row, and Adam works element by element: what trains together does not touch. Learning rates are copies.
Cost: microseconds of arithmetic per step, so that a step costs what the loop around it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from effml_shared.loop import Budget, Loop
from effml_shared.runs import Run, Trial
from effml_shared.schedules import Plan, cosine
from effml_shared.steps import GradientStep
from torch import Tensor, nn

from effml_quant.lotion.penalty import lotion_penalty
from effml_quant.qat import WeightMethod, attach, cast_weights, placed_weights
from effml_quant.quantizer import Quantizer

__all__ = ["Problem", "Quadratic", "RowMethod", "TwoLayers", "train_rows"]


class Rows(nn.Module):
    """One weight (seeds, n), each row a tensor with a scale of its own."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self) -> Tensor:
        return self.weight


class Problem(nn.Module):
    """Losses of all seeds and their curvature."""

    def losses(self) -> Tensor:
        """Return the loss of each seed, (seeds,)."""
        raise NotImplementedError

    def curvatures(self) -> list[tuple[Rows, Tensor]]:
        """Return each weight with the diagonal of its Gauss-Newton matrix, detached."""
        raise NotImplementedError


def _drawn(seeds: int, *sizes: int) -> list[Tensor]:
    """Return standard normal numbers (seeds, size), float64; row s follows from seed s alone."""
    rows = []
    for seed in range(seeds):
        stream = torch.Generator().manual_seed(seed)
        rows.append([torch.randn(size, generator=stream) for size in sizes])
    return [torch.stack(column).double() for column in zip(*rows, strict=True)]


def _spectrum(dim: int, power: float) -> Tensor:
    return torch.arange(1, dim + 1, dtype=torch.float64) ** -power


class Quadratic(Problem):
    """The quadratic; starts at 0.1 N(0, 1)."""

    def __init__(self, seeds: int, dim: int, power: float) -> None:
        super().__init__()
        target, start = _drawn(seeds, dim, dim)
        self.rows = Rows(0.1 * start)
        self.target, self.curvature = target, _spectrum(dim, power)

    def losses(self) -> Tensor:
        return 0.5 * (self.curvature * (self.rows() - self.target).square()).sum(1)

    def curvatures(self) -> list[tuple[Rows, Tensor]]:
        return [(self.rows, self.curvature.expand_as(self.target))]


class TwoLayers(Problem):
    """Two linear layers of hidden width k with one output; both start with unit variance of their outputs."""

    def __init__(self, seeds: int, dim: int, power: float, width: int) -> None:
        super().__init__()
        target, first, second = _drawn(seeds, dim, width * dim, width)
        self.width = width
        self.first, self.second = Rows(first / math.sqrt(dim)), Rows(second / math.sqrt(width))
        self.target, self.spectrum = target, _spectrum(dim, power)

    def losses(self) -> Tensor:
        product = (self.second()[:, None] @ self._matrix(self.first()))[:, 0]
        return 0.5 * (self.spectrum * (product - self.target).square()).sum(1)

    def curvatures(self) -> list[tuple[Rows, Tensor]]:
        w1, w2 = self._matrix(self.first.weight.detach()), self.second.weight.detach()
        first = w2.square()[:, :, None] * self.spectrum
        return [(self.first, first.flatten(1)), (self.second, (w1.square() * self.spectrum).sum(2))]

    def _matrix(self, rows: Tensor) -> Tensor:
        return rows.unflatten(1, (self.width, -1))


@dataclass(frozen=True)
class RowMethod:
    """How a problem is trained.

    Attributes:
        method: what stands between weights and loss; None: nothing.
        strength: of LOTION's penalty with the exact curvature; 0: none.
        through_scale: whether the penalty's gradient goes through the scale.
    """

    method: WeightMethod | None = None
    strength: float = 0.0
    through_scale: bool = True


class _NoData:
    """Batches of one row that says nothing: the loss is the expectation already."""

    def next(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class _Objective(GradientStep):
    """Report the sum over seeds and learning rates by a name of its own: no plot of losses is to show it as one."""

    def __call__(self, batch: Any, plan: Plan) -> dict[str, float]:
        return {"objective": super().__call__(batch, plan)["loss"]}


def _is_rows(name: str, module: nn.Module) -> bool:
    return isinstance(module, Rows)


def train_rows(
    run: Run,
    name: str,
    problem: Callable[[], Problem],
    how: RowMethod,
    quantizer: Quantizer,
    *,
    learning_rates: Sequence[float],
    steps: int,
    draws: int,
) -> dict[str, Any]:
    """Train a problem once per learning rate, with Adam and a cosine to 0, unless the run has done so.

    Returns:
        `rtn`, `rr`: per learning rate the losses of all seeds at weights cast to nearest, and their mean over draws of
        randomised rounding; `full`: at the weights themselves. Infinite where training diverged.
    """

    def body(trial: Trial) -> dict[str, Any]:
        problems = [problem() for _ in learning_rates]
        copies = nn.ModuleList(problems)
        attached = None if how.method is None else attach(copies, how.method, _is_rows)
        optimizer = torch.optim.Adam(
            [{"params": list(copy.parameters()), "lr": lr} for copy, lr in zip(problems, learning_rates, strict=True)]
        )

        def loss(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
            total = torch.stack([copy.losses().sum() for copy in problems]).sum()
            if how.strength:
                for copy in problems:
                    for rows, g in copy.curvatures():
                        total = total + how.strength * lotion_penalty(rows.weight, g, quantizer, how.through_scale)
            return total, torch.ones(())

        def losses(cast: str | None) -> list[list[float]]:
            with torch.no_grad():
                weights = {} if cast is None else cast_weights(copies, quantizer, cast, filter=_is_rows)
                with placed_weights(copies, weights):
                    return [copy.losses().tolist() for copy in problems]

        def evaluate() -> dict[str, float]:
            return {"rtn": min(sum(row) / len(row) for row in losses("rtn"))}

        step = _Objective(copies, optimizer, loss)
        loop = Loop(
            step,
            _NoData(),
            cosine(1, steps),
            budget=Budget(samples=steps),
            hooks=trial.hooks,
            evaluate=evaluate,
            evaluate_every=max(1, steps // 50),
            checkpoints=trial.checkpoints,
        )
        clock = loop.run()
        if attached is not None:
            attached.restore()
        rr = torch.tensor([losses("rr") for _ in range(draws)]).mean(0).tolist()
        return {
            "method": trial.name.partition("/")[0],
            "samples": clock.samples,
            "rtn": losses("rtn"),
            "rr": rr,
            "full": losses(None),
        }

    return run.trial(name, body)
