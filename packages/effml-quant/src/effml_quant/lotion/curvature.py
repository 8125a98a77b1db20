"""Estimates of the Gauss-Newton diagonal g that weighs LOTION's penalty, from gradients at hand.

For cross-entropy averaged over N terms (tokens of the global batch) the Gauss-Newton matrix is Fisher's, and

    g_ii = E_n (dl_n/dw_i)^2, estimated by an average over steps, with bias correction, of

    empirical_fisher          N (dL/dw_i)^2 of the ordinary gradient; true labels bias it by the residuals; free
    microbatch_difference     (N/4) (g_A - g_B)^2 of half-batch gradients: without the bias N (mean gradient)^2; free
    gnb                       N (dL'/dw_i)^2, labels of L' drawn from the model: unbiased; a backward pass of its own
    per_example               mean of squared per-example gradients: exact for the labels; for tests and small models
    adam                      N v_i, Adam's own second moment: no state, and the penalty's gradient enters it
    exact                     what the user knows

The factor N is not a detail: squares of a batch's *mean* gradient are N times too small, and the penalty vanishes.
Terms of one sequence are correlated, so N counts somewhat too many; the strength takes that up.

State: one average per weight, float32, 4 bytes each; none for `adam` and `exact`; one more buffer for
`microbatch_difference`. Cost per update: 12 bytes of memory traffic per weight.
Sources: arXiv 2510.08757 (empirical Fisher; its N and average are not known to us); the sampled-label form is that of
arXiv 2305.14342; the difference of halves is derived here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from effml_shared import distributed
from effml_shared.errors import CheckpointError, ConfigError
from torch import Tensor, nn

__all__ = ["CURVATURES", "Curvature", "make_curvature", "per_example_squares", "sampled_cross_entropy"]

PIECE = (1 << 15) - 1  # numbers that stay in a CPU's cache between two operations, and take one thread
Weights = Mapping[str, nn.Parameter]


class Curvature:
    """Average n x^2 over steps for each weight; subclasses say what x is.

    Args:
        weights: by name.
        beta: decay of the average per update.
    """

    def __init__(self, weights: Weights, beta: float) -> None:
        self.weights, self.beta = weights, beta
        self.averages: dict[str, Tensor] = {}
        self.updates: dict[str, int] = {}

    def update(self, names: Iterable[str], n_terms: float) -> None:
        """Take this step's gradients, in `.grad` as means over n_terms, into the averages of some weights."""
        raise NotImplementedError

    def diagonal(self, name: str) -> tuple[Tensor, float] | None:
        """Return g as a tensor like the weight and a factor to multiply by, or None as long as there is none."""
        if name not in self.averages:
            return None
        return self.averages[name], 1 / (1 - self.beta ** self.updates[name])

    def average(self, name: str, x: Tensor, factor: float) -> None:
        """Update one average with factor x^2."""
        weight = self.weights[name]
        if name not in self.averages:
            wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
            self.averages[name] = torch.zeros_like(weight, dtype=wide, memory_format=torch.contiguous_format)
            self.updates[name] = 0
        self.updates[name] += 1
        average, x = local(self.averages[name]).view(-1), local(x.detach()).reshape(-1)
        piece = PIECE if x.device.type == "cpu" else max(x.numel(), 1)
        for old, new in zip(average.split(piece), x.split(piece), strict=True):
            new = new.to(old.dtype)
            old.mul_(self.beta).addcmul_(new, new, value=(1 - self.beta) * factor)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and how many updates they have."""
        return {"averages": dict(self.averages), "updates": dict(self.updates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned; whole tensors are sharded where the weights are.

        Raises:
            CheckpointError: it is of other weights.
        """
        for name, value in state["averages"].items():
            if name not in self.weights or self.weights[name].shape != value.shape:
                raise CheckpointError(f"checkpoint does not fit: got curvature of {name}, {tuple(value.shape)}")
        self.averages = {
            name: distributed.shard_like(value.detach().to(self.weights[name].device, copy=True), self.weights[name])
            for name, value in state["averages"].items()
        }
        self.updates = {name: int(count) for name, count in state["updates"].items()}


class EmpiricalFisher(Curvature):
    """x is the gradient, n the number of terms."""

    def update(self, names: Iterable[str], n_terms: float) -> None:
        for name in names:
            self.average(name, cast(Tensor, self.weights[name].grad), n_terms)


class GaussNewton(Curvature):
    """x is a gradient of its own, with labels drawn from the model.

    Args:
        closure: runs a forward pass and returns the mean loss of `sampled_cross_entropy` and its number of terms.
    """

    def __init__(self, weights: Weights, beta: float, closure: Callable[[], tuple[Tensor, Any]]) -> None:
        super().__init__(weights, beta)
        if any(map(distributed.is_sharded, weights.values())):
            raise ConfigError("curvature: got 'gnb' for sharded weights, expected 'empirical_fisher' or 'adam'")
        self.closure = closure

    def update(self, names: Iterable[str], n_terms: float) -> None:
        names = list(names)
        with torch.enable_grad():
            loss, count = self.closure()
            gradients = torch.autograd.grad(loss, [self.weights[name] for name in names], allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            x = torch.zeros_like(self.weights[name]) if gradient is None else gradient
            factor = float(count)
            if distributed.world_size() > 1:  # each rank has drawn labels of its own: the mean of all estimates
                x = x.float().square_().mul_(factor / distributed.world_size())
                dist.all_reduce(x)
                x, factor = x.sqrt_(), 1.0
            self.average(name, x, factor)


class PerExample(Curvature):
    """x^2 is what a closure returns by name, such as `per_example_squares`."""

    def __init__(self, weights: Weights, beta: float, closure: Callable[[], Mapping[str, Tensor]]) -> None:
        super().__init__(weights, beta)
        self.closure = closure

    def update(self, names: Iterable[str], n_terms: float) -> None:
        squares = self.closure()
        for name in names:
            self.average(name, _known(squares, name, self.weights[name]).sqrt(), 1.0)


class MicrobatchDifference(Curvature):
    """x is half the difference of the mean gradients of a step's even and odd micro-batches.

    A hook sees each micro-batch's own gradient before it is added to `.grad`. What the loop multiplies `.grad` by
    afterwards (a sum made a mean) is read off the norm of one weight's gradient. Halves should be equally large.
    """

    def __init__(self, weights: Weights, beta: float) -> None:
        super().__init__(weights, beta)
        if distributed.world_size() > 1 or any(map(distributed.is_sharded, weights.values())):
            raise ConfigError("curvature: got 'microbatch_difference' on several processes, expected one process")
        self.differences: dict[str, Tensor] = {}
        self.passes: dict[str, int] = dict.fromkeys(weights, 0)
        self.norms: dict[str, Tensor] = {}
        self.pending: dict[str, Tensor] = {}
        for name, weight in weights.items():
            weight.register_hook(partial(self._see, name))
            weight.register_post_accumulate_grad_hook(partial(self._count, name))

    def _see(self, name: str, gradient: Tensor) -> None:
        if self.weights[name].grad is None:  # passes seen before, if any, belong to a step that was skipped
            self.passes[name] = 0
        self.pending[name] = gradient.detach()

    def _count(self, name: str, weight: Tensor) -> None:
        """Take the pass only here: `torch.autograd.grad` shows gradients too, but adds none to `.grad`."""
        gradient = self.pending.pop(name)
        sign = -1.0 if self.passes[name] % 2 else 1.0
        if name in self.differences and self.passes[name]:
            self.differences[name].add_(gradient, alpha=sign)
        else:
            self.differences[name] = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        self.passes[name] += 1
        self.norms[name] = self._norm(weight)

    @staticmethod
    def _norm(weight: Tensor) -> Tensor:
        gradient = cast(Tensor, weight.grad)
        return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))

    def update(self, names: Iterable[str], n_terms: float) -> None:
        for name in names:
            if self.passes[name] % 2 or not self.passes[name]:
                got = f"{self.passes[name]} micro-batches in a step"
                raise ConfigError(f"curvature: got {got}, expected an even number for 'microbatch_difference'")
            now = self._norm(self.weights[name])
            scale = torch.where(self.norms[name] > 0, now / self.norms[name], 0.0)
            self.average(name, self.differences[name].mul_(scale), n_terms)

    def clear(self, names: Iterable[str]) -> None:
        """Begin a step of some weights."""
        self.passes.update(dict.fromkeys(names, 0))


class Exact(Curvature):
    """g is known: a mapping by name, or a function that returns one at each step."""

    def __init__(self, weights: Weights, source: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]) -> None:
        super().__init__(weights, 0.0)
        self.source = source
        self.known: Mapping[str, Tensor] = {} if callable(source) else source

    def update(self, names: Iterable[str], n_terms: float) -> None:
        if callable(self.source):
            self.known = self.source()

    def diagonal(self, name: str) -> tuple[Tensor, float] | None:
        if callable(self.source) and not self.known:
            return None
        return _known(self.known, name, self.weights[name]), 1.0


class AdamMoment(Curvature):
    """g is N times the bias-corrected second moment of an Adam that trains the weights."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights, 0.0)
        self.optimizers: list[torch.optim.Optimizer] = []
        self.n_terms = 1.0

    def update(self, names: Iterable[str], n_terms: float) -> None:
        self.n_terms = n_terms

    def read(self, optimizer: torch.optim.Optimizer) -> None:
        """Use an optimizer's state for the weights that it trains.

        Raises:
            ConfigError: it keeps no element-wise second moment.
        """
        if "Adam" not in type(optimizer).__name__ or "betas" not in optimizer.defaults:
            got = type(optimizer).__name__
            raise ConfigError(f"curvature: got 'adam' with {got}, expected Adam, AdamW or 'empirical_fisher'")
        self.optimizers.append(optimizer)

    def diagonal(self, name: str) -> tuple[Tensor, float] | None:
        weight = self.weights[name]
        owners = ((o, g) for o in self.optimizers for g in o.param_groups if any(p is weight for p in g["params"]))
        optimizer, group = next(owners, (None, {}))
        if optimizer is None:
            raise ConfigError(f"curvature: got 'adam' without an optimizer of {name}, expected attach(optimizer)")
        state = optimizer.state.get(weight)
        if not state:
            return None  # before its first step
        moment = state.get("exp_avg_sq")
        if moment is None or moment.shape != weight.shape:
            raise ConfigError(f"curvature: got no exp_avg_sq of {name} in {type(optimizer).__name__}'s state")
        return moment, self.n_terms / (1 - float(group["betas"][1]) ** float(state["step"]))


CURVATURES = ("empirical_fisher", "microbatch_difference", "gnb", "per_example", "adam", "exact")


def make_curvature(kind: str, weights: Weights, beta: float, source: Any = None) -> Curvature:
    """Return the estimate of a name in `CURVATURES`.

    Args:
        source: of `gnb`, `per_example` and `exact`; see their classes.

    Raises:
        ConfigError: the source is missing, or there is one too many.
    """
    if kind in ("gnb", "per_example"):
        if not callable(source):
            raise ConfigError(f"source: got {type(source).__name__}, expected a function for curvature={kind!r}")
        return GaussNewton(weights, beta, source) if kind == "gnb" else PerExample(weights, beta, source)
    if kind == "exact":
        if not callable(source) and not isinstance(source, Mapping):
            raise ConfigError(f"source: got {type(source).__name__}, expected tensors by name for curvature='exact'")
        return Exact(weights, source)
    if source is not None:
        raise ConfigError(f"source: got {type(source).__name__}, expected None for curvature={kind!r}")
    if kind == "adam":
        return AdamMoment(weights)
    return MicrobatchDifference(weights, beta) if kind == "microbatch_difference" else EmpiricalFisher(weights, beta)


def sampled_cross_entropy(
    logits: Tensor, generator: torch.Generator | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy in nats of labels drawn from the model's own distribution, and their number.

    Args:
        logits: (..., classes).
        mask: bool (...), which positions count; None: all.
    """
    log_p = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1).flatten(0, -2)
    if mask is not None:
        log_p = log_p[mask.flatten()]
    labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
    count = torch.tensor(math.prod(labels.shape), device=logits.device)
    return -log_p.gather(-1, labels).sum() / count.clamp(min=1), count


def per_example_squares(
    loss: Callable[[dict[str, Tensor], Any], Tensor], parameters: Mapping[str, Tensor], batch: Any
) -> dict[str, Tensor]:
    """Return the mean over examples of squared gradients, by name.

    Args:
        loss: of one example, `loss(parameters, example)`, a scalar; with `torch.func.functional_call` inside.
        batch: a tensor or a tree of tensors, examples along the first axis.
    """
    parameters = {name: p.detach() for name, p in parameters.items()}
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch)
    return {name: g.square().mean(0) for name, g in gradients.items()}


def local(x: Tensor) -> Tensor:
    """Return this process's part of a tensor."""
    return x.to_local() if distributed.is_sharded(x) else x


def _known(values: Mapping[str, Tensor], name: str, weight: Tensor) -> Tensor:
    value = values.get(name)
    if not isinstance(value, Tensor) or value.shape != weight.shape:
        got = "nothing" if value is None else f"shape {tuple(value.shape)}"
        raise ConfigError(f"source: got {got} for {name}, expected a tensor of shape {tuple(weight.shape)}")
    return value
