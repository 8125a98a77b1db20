"""The gradient noise scale, or critical batch size, measured while training accumulates micro-batches.

One sample's gradient has a mean mu and a covariance Sigma. A micro-batch of b_j samples adds g_j to the running sum S,
with E||g_j||^2 = b_j^2 ||mu||^2 + b_j tr Sigma; over a step of n = sum b_j samples, with q = sum b_j^2,

    E sum_j ||g_j||^2 = q ||mu||^2 + n tr Sigma          E||S||^2 = n^2 ||mu||^2 + n tr Sigma

Two equations, two unknowns: both solutions are unbiased, whatever the sizes of the micro-batches. They are averaged
over steps each on its own, and only then divided: B_simple = tr Sigma / ||mu||^2, the batch at which the gradient's
variance is as large as its mean, and (tr Sigma / B) / (||mu||^2 + tr Sigma / B), the share of the variance in the
gradient's second moment at batch B. A common factor of all gradients (loss scaling, a mean for a sum) cancels.

Nothing is copied: a hook on each parameter sees a micro-batch's own gradient just before it is added to `.grad`, and
another the sum just after. What happens to `.grad` later (rescaling, clipping, the reduction over DDP's ranks) is not
seen. So each rank estimates from its own micro-batches, and the averages of all ranks are averaged when read.

State: two numbers. Cost: each pass reads its gradient and the sum once more; one synchronisation with a GPU per step;
a small all-reduce per reading if there are several ranks.

Source: B_simple and its estimator from two batch sizes, arXiv 1812.06162, appendix A; here the two are one micro-batch
and the step, and the solution for unequal micro-batches is derived here. The share of the variance tells where
arXiv 2510.14717 lets a batch ramp stand in for a decay of the learning rate (its Assumption 3).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
from effml_shared import distributed
from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError
from effml_shared.loop import Hook, Loop
from torch import Tensor

__all__ = ["NoiseScaleMonitor"]

_log = logging.getLogger(__name__)


class NoiseScaleMonitor(Hook):
    """Estimate the noise scale of the gradient from the micro-batches of each step.

    In the `Loop`, put it before the trial's own hooks: they record the `noise_scale` (in samples) and `variance_share`
    (at the step's batch) that it adds to a step's metrics. In any other loop call `update` after the last backward
    pass of a step, or let the optimizer do it: `optimizer.register_step_post_hook(lambda *_: monitor.update())`.

    Args:
        parameters: of the model, whole or in DDP; frozen ones are passed over, here and for good.
        micro_batch: samples per backward pass and rank, as in `GradientStep`. A step needs two passes to say anything.
        decay: of the averages, per step.

    Raises:
        ConfigError: micro_batch or decay is out of range, nothing can be trained, or a parameter is sharded.

    >>> model = torch.nn.Linear(4, 1)
    >>> with NoiseScaleMonitor(model.parameters(), micro_batch=8) as monitor:
    ...     for _ in range(2):
    ...         model(torch.randn(8, 4)).square().sum().backward()
    ...     monitor.update()
    >>> 0 < monitor.variance_share(batch=16) <= 1
    True
    """

    def __init__(self, parameters: Iterable[Tensor], micro_batch: int, *, decay: float = 0.95) -> None:
        check_count("micro_batch", micro_batch, 1)
        check_range("decay", decay, 0.0, 1.0)
        watched = [parameter for parameter in parameters if parameter.requires_grad]
        if not watched:
            raise ConfigError("parameters: got none that requires a gradient, expected at least one")
        if any(map(distributed.is_sharded, watched)):
            raise ConfigError("parameters: got a sharded one (FSDP), expected whole ones: one process or DDP")
        self.micro_batch, self.decay = micro_batch, decay
        self._trace = self._mean = 0.0  # running averages of tr Sigma and ||mu||^2
        self._samples = 0  # on the loop's clock, at the end of the step before
        self._warned = False
        self._clear()
        self._handles = [
            handle
            for index, parameter in enumerate(watched)
            for handle in (
                parameter.register_hook(partial(self._see_gradient, index)),
                parameter.register_post_accumulate_grad_hook(partial(self._see_sum, index)),
            )
        ]

    def _clear(self) -> None:
        self._latest: dict[int, Tensor] = {}  # per parameter: ||g_j||^2 of the pass in progress
        self._squares: dict[int, Tensor] = {}  # sum_j ||g_j||^2
        self._sums: dict[int, Tensor] = {}  # ||S||^2
        self._passes: Counter[int] = Counter()

    def _see_gradient(self, index: int, gradient: Tensor) -> None:
        self._latest[index] = _square(gradient)

    def _see_sum(self, index: int, parameter: Tensor) -> None:
        """Count the pass only here: `torch.autograd.grad` shows gradients too, but adds none to `.grad`."""
        self._squares[index] = self._squares.get(index, 0) + self._latest.pop(index)
        self._sums[index] = _square(cast(Tensor, parameter.grad))
        self._passes[index] += 1

    def update(self, samples: int | None = None) -> None:
        """End a step: take its estimate into the averages.

        A step of one micro-batch, or with a gradient that is not finite, has no estimate and changes nothing.

        Args:
            samples: of the step, over all ranks, dealt as `effml_shared.data.Loader` deals them; None: every pass had
                a full micro-batch. Where the last one was smaller, losses must be sums, as `GradientStep` has them.

        Raises:
            ConfigError: so many samples are not so many passes of `micro_batch`.
        """
        passes = max(self._passes.values(), default=0)  # of a parameter that every pass reaches
        if not passes:
            return
        squares, total = _sum(self._squares), _sum(self._sums)
        self._clear()
        count, most = self._share(samples) if samples is not None else (passes * self.micro_batch,) * 2
        if math.ceil(most / self.micro_batch) != passes:
            got = f"{self.micro_batch}, but the gradient of {most} samples came in {passes} passes"
            raise ConfigError(f"micro_batch: got {got}, expected that of the training step")
        last = count - (passes - 1) * self.micro_batch
        q = (passes - 1) * self.micro_batch**2 + last**2
        pairs = count**2 - q  # ordered pairs of samples from different micro-batches
        if not pairs:
            self._warn_once()
        elif math.isfinite(squares) and math.isfinite(total):
            self._average((squares * count**2 - total * q) / (count * pairs), (total - squares) / pairs)

    def _share(self, samples: int) -> tuple[int, int]:
        """Return how many of a global batch are this rank's, and how many the rank with most has."""
        rank, world = distributed.rank(), distributed.world_size()
        return samples * (rank + 1) // world - samples * rank // world, -(-samples // world)

    def _warn_once(self) -> None:
        if not self._warned:
            _log.warning("noise scale: a step of one micro-batch has no estimate; accumulate two or more per rank")
        self._warned = True

    def _average(self, trace: float, mean: float) -> None:
        self._trace += (1 - self.decay) * (trace - self._trace)
        self._mean += (1 - self.decay) * (mean - self._mean)

    @property
    def b_simple(self) -> float:
        """Noise scale in samples: infinite where no mean stands out, NaN before any estimate. Read it on all ranks."""
        trace, mean = (max(average, 0.0) for average in distributed.reduce_sum(self._trace, self._mean))
        return trace / mean if mean > 0 else math.inf if trace > 0 else math.nan

    def variance_share(self, batch: float) -> float:
        """Return the part of the gradient's second moment that is variance at a batch of so many samples."""
        noise_scale = self.b_simple
        return 1.0 if math.isinf(noise_scale) else noise_scale / (noise_scale + batch)

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        """End the step and add the readings to its metrics."""
        batch = loop.clock.samples - self._samples
        self._samples = loop.clock.samples
        self.update(batch)
        readings = {"noise_scale": self.b_simple, "variance_share": self.variance_share(batch)}
        cast(dict[str, float], metrics).update(readings)  # a Step returns a dict; the hooks behind write it down

    def on_start(self, loop: Loop) -> None:
        """Start from the loop's clock, which a checkpoint may have set."""
        self._samples = loop.clock.samples

    def state_dict(self) -> dict[str, Any]:
        """Return the averages over all ranks; call it on all."""
        world = distributed.world_size()
        trace, mean = distributed.reduce_sum(self._trace, self._mean)
        return {"trace": trace / world, "mean": mean / world}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, on any number of ranks."""
        self._trace, self._mean = state["trace"], state["mean"]

    def close(self) -> None:
        """Take all hooks off the parameters; the readings stay."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> NoiseScaleMonitor:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _square(gradient: Tensor) -> Tensor:
    """Return the squared norm, in float32 or wider."""
    gradient = gradient.detach()  # it has a history under create_graph
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)).square()


def _sum(values: dict[int, Tensor]) -> float:
    """Add up on the host, in float64, after one transfer per device."""
    device = next(iter(values.values())).device
    return math.fsum(torch.stack([value.to(device) for value in values.values()]).tolist())
