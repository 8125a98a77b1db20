"""LOTION in a training loop: the ordinary loss on full-precision weights, plus a penalty on rounding them.

    loss.backward()                                    # of the plain loss, a mean over N terms
    lotion.accumulate(N)                               # curvature, from the gradient before clipping
    clip_grad_norm_(...)
    lotion.add_penalty_()                              # grad += strength(t) grad R
    optimizer.step()

or, with any optimizer, `lotion.attach(optimizer, N, clip_norm=...)` once: hooks of `optimizer.step` do all but the
backward pass. The forward pass never sees quantised weights; evaluate and export with `cast`. Let the learning rate
decay: at a constant one, weights do not settle on the grid.

State: the curvature, 4 bytes per weight (none with `curvature="adam"`). Cost per step: see `penalty` and `curvature`.
One number per weight tensor is read back to the host, so one synchronisation with a GPU.

Source: arXiv 2510.08757. By derivation the strength is 1; which the paper used, and its averages, is not known to us.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from effml_shared import distributed
from effml_shared.checks import check_range
from effml_shared.errors import CheckpointError, ConfigError, NonFiniteError
from effml_shared.loop import Hook, Loop
from effml_shared.steps import Loss
from torch import Tensor, nn

from effml_quant.lotion.configuration import LotionConfig, choose_weights
from effml_quant.lotion.curvature import AdamMoment, MicrobatchDifference, local, make_curvature
from effml_quant.lotion.penalty import lotion_penalty, penalty_gradient
from effml_quant.lotion.report import LayerReport, layer_report
from effml_quant.lotion.shards import reducer, share
from effml_quant.quantizer import Quantizer
from effml_quant.selection import WeightFilter

__all__ = ["Lotion"]


class Lotion(Hook):
    """Add LOTION's penalty to the gradients of some weights.

    As a hook of the `Loop` it also records the `penalty` of each step, and its state travels in the checkpoint.

    Args:
        model: a module (also in DDP, compiled, or sharded by FSDP2), or parameters, or (name, parameter) pairs.
            Frozen weights are passed over, tied ones taken once.
        config: None: the defaults.
        filter: which modules of the model; None: inner linear and convolution layers.
        source: for `curvature="gnb"` a function that returns mean loss and count of `sampled_cross_entropy`; for
            `"per_example"` one that returns mean squares by name; for `"exact"` the curvature by name.

    Attributes:
        weights: by name.
        quantizer: of the config.

    Raises:
        ConfigError: there is no weight to train, or one is not floating; the source does not fit the curvature.

    >>> layer = nn.Linear(4, 2)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> lotion = Lotion(layer, LotionConfig("int4", strength=0.5))
    >>> lotion.attach(optimizer, n_terms=8)
    >>> layer(torch.randn(8, 4)).square().mean().backward()
    >>> optimizer.step()
    >>> bool(lotion.penalty() > 0)
    True
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        config: LotionConfig | None = None,
        filter: WeightFilter | None = None,
        *,
        source: Any = None,
    ) -> None:
        self.config = config or LotionConfig()
        self.quantizer = self.config.quantizer
        self.weights = choose_weights(model, filter)
        self.curvature = make_curvature(self.config.curvature, self.weights, self.config.beta, source)
        self._reduce = {name: reducer(weight, self.quantizer) for name, weight in self.weights.items()}
        self._steps = dict.fromkeys(self.weights, 0)
        self._latest: dict[str, float] = {}  # of this step, penalty by the first weight of each optimizer
        self._counted: Tensor | float = 0.0
        self._handles: list[Any] = []

    def accumulate(self, n_terms: float | None = None) -> None:
        """Take the gradients in `.grad` into the curvature: after their reduction over ranks, before clipping.

        Args:
            n_terms: how many terms `.grad` is the *mean* over: tokens of all ranks and micro-batches. None: only with
                a fixed or no `batch_correction`.

        Raises:
            ConfigError: n_terms is missing or not positive; a weight has no gradient, or a sparse one.
        """
        self._accumulate(list(self._trained()), n_terms)

    def _accumulate(self, names: list[str], n_terms: float | None) -> None:
        n = self._check_terms(n_terms)
        for name in names:
            self._gradient(name)
        due = [name for name in names if self._steps[name] % self.config.every == 0]
        if due:
            self.curvature.update(due, n)
        if isinstance(self.curvature, MicrobatchDifference):
            self.curvature.clear(names)
        for name in names:
            self._steps[name] += 1

    @torch.no_grad()
    def add_penalty_(self) -> None:
        """Add the penalty's gradient to `.grad`: after clipping, before the optimizer's step.

        Raises:
            ConfigError: as `accumulate`, or the config has `coupled=False`.
            NonFiniteError: weights or curvature are NaN or infinite.
        """
        if not self.config.coupled:
            raise ConfigError("coupled: got False, expected apply_penalty_(optimizer) after its step")
        self._add(list(self._trained()))

    def _add(self, names: list[str]) -> None:
        gradients = {name: local(self._gradient(name)) for name in names}
        self._record(self._each(lambda name, known, k: self._gradient_of(name, known, k, gradients[name])[1], names))

    @torch.no_grad()
    def apply_penalty_(self, optimizer: torch.optim.Optimizer) -> None:
        """Take w <- w - lr grad R for the weights of an optimizer, after its step: `coupled=False`.

        Raises:
            NonFiniteError: weights or curvature are NaN or infinite.
        """
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        names = [name for name, weight in self._trained().items() if id(weight) in rates]

        def shrink(name: str, known: tuple[Tensor, float], strength: float) -> Tensor:
            gradient, value = self._gradient_of(name, known, strength)
            local(self.weights[name].detach()).sub_(gradient * rates[id(self.weights[name])])
            return value

        self._record(self._each(shrink, names))

    def _each(self, work: Callable[[str, tuple[Tensor, float], float], Tensor], names: list[str]) -> dict[str, Tensor]:
        """Return `work(name, curvature, strength)` for the weights that have a penalty."""
        values = {}
        for name in names:
            known, strength = self.curvature.diagonal(name), self._strength(name)
            if known is None and not self._steps[name]:
                raise ConfigError(f"{name}: got a penalty before any curvature, expected accumulate() first")
            if known is not None and strength:
                values[name] = work(name, known, strength)
        return values

    def _gradient_of(
        self, name: str, known: tuple[Tensor, float], strength: float, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        g, factor = known
        return penalty_gradient(
            local(self.weights[name].detach()),
            local(g),
            self.quantizer,
            strength * factor,
            self.config.through_scale,
            out=out,
            reduce=self._reduce[name],
        )

    def _record(self, values: dict[str, Tensor]) -> None:
        if not values:
            return
        on_host = dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
        total = sum(on_host.values())
        if any(map(distributed.is_sharded, self.weights.values())):
            parts = (share(self.weights[name], self.quantizer) * value for name, value in on_host.items())
            (total,) = distributed.reduce_sum(sum(parts))
        if not math.isfinite(total):
            bad = next((name for name, value in on_host.items() if not math.isfinite(value)), "another rank's shard")
            raise NonFiniteError(f"{bad}: got a penalty that is not finite, expected finite weights and curvature")
        self._latest[next(iter(values))] = total

    def penalty(self) -> Tensor:
        """Return strength R over all weights, a differentiable scalar; 0 before any curvature is known.

        Raises:
            ConfigError: a weight is sharded: use `report`.
        """
        total: Tensor | None = None
        for name, weight in self.weights.items():
            if distributed.is_sharded(weight):
                raise ConfigError(f"{name}: got a sharded weight, expected a whole one; report() has its penalty")
            known = self.curvature.diagonal(name)
            if known is not None:
                part = lotion_penalty(weight, known[0], self.quantizer, self.config.through_scale)
                part = part * (known[1] * self._strength(name))
                total = part if total is None else total + part
        return torch.zeros(()) if total is None else total

    def attach(
        self,
        optimizer: torch.optim.Optimizer,
        n_terms: float | Callable[[], float] | None = None,
        clip_norm: float | None = None,
    ) -> None:
        """Let `optimizer.step()` do everything, for those of the weights that it trains; `detach` undoes it.

        Args:
            optimizer: any; also one that accelerate has wrapped.
            n_terms: as in `accumulate`, or a function that returns it. None: as counted by `counting`.
            clip_norm: largest norm of the optimizer's gradients. Clipping belongs between curvature and penalty, so
                give it here and not to the loop.

        Raises:
            ConfigError: the optimizer trains none of the weights, or does not fit the curvature.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)
        if clip_norm is not None:
            check_range("clip_norm", clip_norm, torch.finfo(torch.float32).tiny)
        if not self._owned(optimizer):
            raise ConfigError("optimizer: got one that trains none of the weights, expected theirs")
        if isinstance(self.curvature, AdamMoment):
            self.curvature.read(optimizer)

        def before(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if any(value is not None for value in (*args[1:], *kwargs.values())):
                raise ConfigError("optimizer: got step(closure), expected gradients that are there before the step")
            if getattr(optimizer, "grad_scale", None) is not None:
                raise ConfigError(
                    "optimizer: got scaled gradients, expected scaler.unscale_(optimizer) before the step"
                )
            names = self._owned(optimizer)
            self._accumulate(names, self._count() if n_terms is None else n_terms() if callable(n_terms) else n_terms)
            if clip_norm is not None:
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
            if self.config.coupled:
                with torch.no_grad():
                    self._add(names)

        self._handles.append(optimizer.register_step_pre_hook(before))
        if not self.config.coupled:
            self._handles.append(optimizer.register_step_post_hook(lambda o, *_: self.apply_penalty_(o)))

    def detach(self) -> None:
        """Take all hooks off the optimizers."""
        while self._handles:
            self._handles.pop().remove()

    def counting(self, loss: Loss) -> Loss:
        """Return a loss of `GradientStep` that tells this object how many terms each step has, over all ranks."""

        def counted(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            total, terms = loss(model, batch)
            if torch.is_grad_enabled():
                before = 0.0 if self._begins() else self._counted
                self._counted = before + torch.as_tensor(terms).detach()
            return total, terms

        return counted

    def _begins(self) -> bool:
        """Say whether no gradient is gathered yet: what was counted before belongs to a step that was skipped.

        Sharded weights do not tell: theirs appear with the last micro-batch.
        """
        return all(weight.grad is None and not distributed.is_sharded(weight) for weight in self.weights.values())

    def _count(self) -> float | None:
        if isinstance(self._counted, float):
            return None  # nobody counts
        (count,) = distributed.reduce_sum(float(self._counted))
        self._counted = torch.zeros_like(self._counted)
        return count

    def report(self, formats: Iterable[str | Quantizer] = ()) -> list[LayerReport]:
        """Return, layer by layer, how far from its grid it is and what casting it is predicted to cost.

        Args:
            formats: others whose cost is wanted too, under this granularity and scale: what to spend bits on.
        """
        others = {
            str(q if isinstance(q, str) else q.format.name): q
            if isinstance(q, Quantizer)
            else LotionConfig(q, self.config.granularity, self.config.scale).quantizer
            for q in formats
        }
        return [
            layer_report(name, weight, self.curvature.diagonal(name), self.quantizer, others)
            for name, weight in self.weights.items()
        ]

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        """Add the step's penalty to its metrics, unless the step was skipped and added none."""
        if self._latest:
            cast(dict[str, float], metrics)["penalty"] = sum(self._latest.values())
        self._latest.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return curvature and step counts."""
        return {"curvature": self.curvature.state_dict(), "steps": dict(self._steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            CheckpointError: it is of other weights.
        """
        if set(state["steps"]) != set(self.weights):
            odd = min(set(state["steps"]) ^ set(self.weights))
            raise CheckpointError(f"checkpoint does not fit: {odd} is not among both its weights and these")
        self.curvature.load_state_dict(state["curvature"])
        self._steps = {name: int(state["steps"][name]) for name in self.weights}

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: weight for name, weight in self.weights.items() if weight.requires_grad}

    def _owned(self, optimizer: torch.optim.Optimizer) -> list[str]:
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [name for name, weight in self._trained().items() if id(weight) in owned]

    def _gradient(self, name: str) -> Tensor:
        gradient = self.weights[name].grad
        if gradient is None:
            raise ConfigError(f"{name}: got no gradient, expected a backward pass that reaches it, or another filter")
        if gradient.layout != torch.strided:
            raise ConfigError(f"{name}: got a gradient of layout {gradient.layout}, expected a dense one")
        return gradient

    def _strength(self, name: str) -> float:
        warmup = self.config.warmup
        return self.config.strength * (min(1.0, self._steps[name] / warmup) if warmup else 1.0)

    def _check_terms(self, n_terms: float | None) -> float:
        correction = self.config.batch_correction
        if correction != "tokens":
            return 1.0 if correction is None else float(correction)
        if n_terms is None or not 0 < n_terms < math.inf:
            raise ConfigError(f"n_terms: got {n_terms}, expected how many terms the gradient is the mean of, above 0")
        return float(n_terms)
