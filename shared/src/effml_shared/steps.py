"""A `Step` turns one batch under one `Plan` into an update and metrics. `GradientStep` is the ordinary one.

Whatever learns in effml is a `Step`: AdamW on a language model, sample-verify-update, an inner solver, an autoencoder
with revival. The loop calls it and stores its `state_dict`; it knows nothing else of it.

Normalisation: a loss function returns the *sum* over its terms and their *count*. Sums are back-propagated and the
gradient is divided once by the count of the whole global batch, so that micro-batches, ranks and ragged masks change
nothing: 8 micro-batches of one row give the gradient of one batch of 8. Cost: one multiplication per gradient entry.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from effml_shared import distributed, seeding
from effml_shared.errors import CheckpointError, ConfigError, NonFiniteError
from effml_shared.schedules import Plan

__all__ = ["GradientStep", "Loss", "Step", "faster_precision", "language_model_loss"]

_log = logging.getLogger(__name__)

Loss = Callable[[nn.Module, Any], tuple[torch.Tensor, torch.Tensor]]
"""`loss(model, batch) -> (sum of the terms, number of terms)`, both scalars; the sum carries the gradient."""


class Step(Protocol):
    """What the loop drives. A metric named `tokens` advances the loop's token clock."""

    def __call__(self, batch: Any, plan: Plan) -> dict[str, float]:
        """Update once from this rank's share of the batch."""

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next update depends on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""


def language_model_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token cross-entropy of a `Transformer` on a packed batch: (sum in nats, number of predicted tokens)."""
    output = model(batch["input_ids"], labels=batch["labels"], doc_ids=batch.get("doc_ids"))
    return output.loss_sum, output.token_count


class GradientStep:
    """One optimizer update from the gradient of a loss.

    Args:
        model: any module; wrap it (DDP, FSDP2) before building the optimizer.
        optimizer: any torch optimizer. Its groups' learning rates at construction are multiplied by the plan's factor.
        loss: see `Loss`.
        micro_batch: rows per forward pass; larger batches accumulate. None: all rows at once.
        clip_norm: largest global gradient norm. None: no clipping.
        precision: `"float32"` (no autocast) or `"bfloat16"` (autocast of the forward pass).
        compile: run the forward pass under `torch.compile`; on a CPU without a C++ compiler, say so and run plainly.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        *,
        micro_batch: int | None = None,
        clip_norm: float | None = None,
        precision: str = "float32",
        compile: bool = False,
    ) -> None:
        if micro_batch is not None and micro_batch < 1:
            raise ConfigError(f"micro_batch: got {micro_batch}, expected an integer >= 1 or None")
        if clip_norm is not None and not clip_norm > 0:
            raise ConfigError(f"clip_norm: got {clip_norm}, expected a number > 0 or None")
        _check_precision(precision)
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.micro_batch, self.clip_norm, self.precision = micro_batch, clip_norm, precision
        self._forward = _compiled(model) if compile else model
        self._names = {parameter: name for name, parameter in self._module.named_parameters()}
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", float(group["lr"]))

    @property
    def _module(self) -> nn.Module:
        return self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model

    def __call__(self, batch: Any, plan: Plan) -> dict[str, float]:
        """Update once; returns `loss` (mean), `grad_norm` (before clipping), `lr` (of the first group) and `tokens`.

        Raises:
            NonFiniteError: the loss or a gradient is NaN or infinite; nothing was updated.
        """
        self.model.train()
        device = next(self.model.parameters()).device
        total, count = torch.zeros(2, dtype=torch.float64, device=device)
        micro_batches = self._split(batch, device)
        for index, micro in enumerate(micro_batches):
            with self._gradient_sync(index == len(micro_batches) - 1):
                with _autocast(device, plan.precision or self.precision):
                    loss_sum, terms = self.loss(self._forward, micro)
                if not loss_sum.requires_grad:
                    raise ConfigError("loss: got a value without gradient; is it detached, or every parameter frozen?")
                loss_sum.backward()
            total += loss_sum.detach()
            count += terms
        loss_total, terms_total = distributed.reduce_sum(float(total), float(count))
        norm = self._scale_gradients(distributed.world_size() / max(terms_total, 1.0), loss_total)
        for group in self.optimizer.param_groups:
            _set_lr(group, group["initial_lr"] * plan.lr_factor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        lr = float(self.optimizer.param_groups[0]["lr"])
        return {"loss": loss_total / max(terms_total, 1.0), "grad_norm": norm, "lr": lr, "tokens": terms_total}

    def evaluate(self, batches: Iterable[Any]) -> dict[str, float]:
        """Return the mean loss per term over batches (each rank brings its own), as `{"loss": ...}`."""
        device = next(self.model.parameters()).device
        total, count = torch.zeros(2, dtype=torch.float64, device=device)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), _autocast(device, self.precision):
                for batch in batches:
                    loss_sum, terms = self.loss(self._forward, _to(batch, device))
                    total += loss_sum
                    count += terms
        finally:
            self.model.train(was_training)
        loss_total, terms_total = distributed.reduce_sum(float(total), float(count))
        return {"loss": loss_total / max(terms_total, 1.0)}

    def state_dict(self) -> dict[str, Any]:
        """Return model, optimizer and precision."""
        optimizer = self.optimizer.state_dict()
        return {"model": self._module.state_dict(), "optimizer": optimizer, "precision": self.precision}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back a state; whole tensors are sharded where the model is.

        Raises:
            CheckpointError: the state belongs to another model.
        """
        own = self._module.state_dict()
        names = set(own) ^ set(state["model"])
        names |= {n for n in own.keys() & state["model"].keys() if own[n].shape != state["model"][n].shape}
        if names:
            raise CheckpointError(
                f"checkpoint does not fit the model: {', '.join(sorted(names)[:3])} differ in name or shape"
            )
        self._module.load_state_dict({n: distributed.shard_like(t, own[n]) for n, t in state["model"].items()})
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        per_parameter = {
            i: {key: distributed.shard_like(value, parameters[i]) for key, value in entry.items()}
            for i, entry in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": per_parameter})
        self.precision = state["precision"]

    def _split(self, batch: Any, device: torch.device) -> list[Any]:
        """Cut this rank's rows into micro-batches, as many on every rank (the last may be empty)."""
        rows = _rows(batch)
        size = self.micro_batch or max(rows, 1)
        (most,) = distributed.reduce_max(math.ceil(rows / size))
        return [_to(_slice(batch, i * size, (i + 1) * size), device) for i in range(max(int(most), 1))]

    @contextlib.contextmanager
    def _gradient_sync(self, last: bool) -> Any:
        """Reduce gradients over ranks only with the last micro-batch."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel) and not last:
            with self.model.no_sync():
                yield
        else:
            if hasattr(self.model, "set_requires_gradient_sync"):
                self.model.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield

    def _scale_gradients(self, scale: float, loss: float) -> float:
        gradients = [p.grad for p in self._names if p.grad is not None]
        if not gradients:
            raise ConfigError(
                "no parameter received a gradient: does the loss depend on the model, is everything frozen?"
            )
        norm_tensor = torch.nn.utils.get_total_norm(gradients)
        full = norm_tensor.full_tensor() if distributed.is_sharded(norm_tensor) else norm_tensor
        norm = float(full) * scale
        if not math.isfinite(norm) or not math.isfinite(loss):
            bad = [name for p, name in self._names.items() if p.grad is not None and not _finite(p.grad)]
            self.optimizer.zero_grad(set_to_none=True)
            where = f"gradient of {bad[0]} ({len(bad)} of {len(gradients)} tensors)" if bad else f"loss ({loss})"
            raise NonFiniteError(f"non-finite {where}; lower the learning rate or inspect the batch")
        factor = scale if self.clip_norm is None else scale * min(1.0, self.clip_norm / (norm + 1e-6))
        if factor != 1.0:
            torch._foreach_mul_(gradients, factor)
        return norm


def faster_precision(model: nn.Module, loss: Loss, batch: Any, *, repeats: int = 3) -> str:
    """Time forward and backward in float32 and under bfloat16 autocast on one batch; return the faster's name.

    bfloat16 must win by a tenth, since it costs accuracy. Gradients and random state are left as they were.
    """
    device = next(model.parameters()).device
    random_state, gradients = seeding.capture(), [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)

    def once(precision: str) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        with _autocast(device, precision):
            loss_sum, _ = loss(model, _to(batch, device))
        loss_sum.backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds = {}
    for precision in ("float32", "bfloat16"):
        once(precision)
        seconds[precision] = statistics.median(once(precision) for _ in range(repeats))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    seeding.restore(random_state)
    faster = distributed.from_main(int(seconds["bfloat16"] < 0.9 * seconds["float32"]))
    return "bfloat16" if faster else "float32"


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a precision's name."""
    _check_precision(precision)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def _check_precision(precision: str) -> None:
    if precision not in ("float32", "bfloat16"):
        raise ConfigError(f"precision: got {precision!r}, expected 'float32' or 'bfloat16'")


def _compiled(model: nn.Module) -> nn.Module:
    on_cpu = next(model.parameters()).device.type == "cpu"
    if on_cpu and not any(map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++", "cl"])):
        _log.warning("compile: no C++ compiler found, so the model runs uncompiled (install g++ or clang++)")
        return model
    return torch.compile(model)  # type: ignore[return-value]


def _set_lr(group: dict[str, Any], value: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(value)
    else:
        group["lr"] = value


def _finite(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if distributed.is_sharded(tensor) else tensor
    return bool(torch.isfinite(local).all())


def _rows(batch: Any) -> int:
    return len(next(iter(batch.values())) if isinstance(batch, dict) else batch)


def _slice(batch: Any, start: int, stop: int) -> Any:
    return {k: v[start:stop] for k, v in batch.items()} if isinstance(batch, dict) else batch[start:stop]


def _to(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, dict):
        return {key: _to(value, device) for key, value in batch.items()}
    return batch.to(device, non_blocking=True) if isinstance(batch, torch.Tensor) else batch
