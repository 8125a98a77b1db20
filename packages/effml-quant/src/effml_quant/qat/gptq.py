"""GPTQ: cast a trained layer column by column; what one column loses, the columns after it make up for.

    H = 2 X^T X + damping mean(diag H) I over the layer's inputs X;   U upper, H^-1 = U^T U
    for j in order:   q_j = cast(w_j);   e = (w_j - q_j) / U_jj;   w_k <- w_k - e U_jk for k > j

Scales are those of the original weight. Inputs come from the model with all earlier layers cast already; layers that
read one and the same tensor (queries, keys, values) share one H and count as one stage. Memory: the calibration batches
and one H in float64. Cost: one forward pass for each stage, cut off behind it, and per layer in^3 + out in^2
multiplications, the updates beyond the next 128 columns as one matrix product. Source: arXiv 2210.17323, sections 3
and 4, without reordering of columns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.tensors import widen
from torch import Tensor, nn

from effml_quant.qat.fixed_scale import block_maxima, cast_rows, check_fixable
from effml_quant.quantizer import Quantizer
from effml_quant.scales import tensor_scale
from effml_quant.selection import WeightFilter, select_modules

__all__ = ["gptq", "gptq_layer"]


def gptq_layer(
    weight: Tensor, hessian: Tensor, quantizer: str | Quantizer, *, damping: float = 0.01, columns: int = 128
) -> Tensor:
    """Return a weight on its grid, in its dtype.

    Args:
        weight: (out, in).
        hessian: (in, in), X^T X up to a factor; of an input that never occurs, its row and column may be zero.
        damping: share of the mean diagonal that is added to it.
        columns: that are updated at once; does not change the result beyond rounding.

    Raises:
        ConfigError: shapes disagree, or the Hessian is not positive definite with so little damping.
        NonFiniteError: the Hessian is not finite.
    """
    quantizer = Quantizer.make(quantizer)
    check_fixable(quantizer)
    check_range("damping", damping, 0.0)
    check_count("columns", columns, 1)
    if weight.ndim != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        got = f"{tuple(weight.shape)} and {tuple(hessian.shape)}"
        raise ConfigError(f"weight, hessian: got {got}, expected (out, in) and (in, in)")
    if weight.numel() == 0:
        return weight.detach().clone()
    upper = _inverse_factor(hessian, damping).to(widen(weight).dtype)
    left = widen(weight.detach()).clone()
    amax = block_maxima(left, quantizer)
    total = tensor_scale(left.abs().amax(), quantizer) if quantizer.scale_kind == "e4m3" else None
    if quantizer.recipe == "torchao" and quantizer.scale_kind == "e4m3":
        total = None  # what its cast does by default
    result = torch.empty_like(left)
    for start in range(0, left.shape[1], columns):
        here = slice(start, start + columns)
        now, errors = left[:, here], torch.zeros_like(left[:, here])
        factor = upper[here, here]
        for j in range(now.shape[1]):
            column = now[:, j : j + 1]
            cast = cast_rows(column, amax[:, start + j : start + j + 1], quantizer, total)
            result[:, start + j] = cast[:, 0]
            errors[:, j] = (column - cast)[:, 0] / factor[j, j]
            now[:, j + 1 :] -= errors[:, j : j + 1] * factor[j, j + 1 :]
        left[:, start + columns :] -= errors @ upper[here, start + columns :]
    return result.to(weight.dtype)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Return the upper triangular U with U^T U the inverse of the damped Hessian, in float64."""
    h = hessian.double()
    if not bool(h.isfinite().all()):
        raise NonFiniteError("hessian: got NaN or infinity; a calibration input is not finite")
    mean = h.diagonal().mean()
    h = h + torch.eye(len(h), dtype=h.dtype, device=h.device) * (damping * mean if mean > 0 else 1.0)
    try:
        return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    except torch.linalg.LinAlgError:
        raise ConfigError(f"damping: got {damping}, expected more: the Hessian is singular") from None


@torch.no_grad()
def gptq(
    model: nn.Module,
    quantizer: str | Quantizer,
    batches: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    filter: WeightFilter | None = None,
    damping: float = 0.01,
) -> dict[str, Tensor]:
    """Return the model's weights on their grids, by parameter name; the model is left as it was.

    Args:
        batches: of calibration, run many times and kept in memory.
        forward: runs the model on a batch; None: `model(batch)`, `model(*batch)` of a list, `model(**batch)` of a dict.
        filter: of modules, which must be linear layers; None: all inner ones.
        damping: see `gptq_layer`.

    Raises:
        ConfigError: a chosen layer is not linear, or never ran on the batches.
    """
    quantizer = Quantizer.make(quantizer)
    modules: dict[str, nn.Linear] = {}
    for name, module in select_modules(model, filter).items():
        if not isinstance(module, nn.Linear):
            raise ConfigError(f"{name}: got {type(module).__name__}, expected nn.Linear: leave it out by a filter")
        modules[name] = module
    batches = list(batches)
    training = {module: module.training for module in model.modules()}
    originals = {name: module.weight.clone() for name, module in modules.items()}
    result: dict[str, Tensor] = {}
    model.eval()
    try:
        passes = _Passes(model, modules, batches, forward or _forward)
        for stage in passes.stages():
            hessian = passes.hessian(stage[0])
            for name in stage:
                cast = gptq_layer(originals[name], hessian, quantizer, damping=damping)
                modules[name].weight.copy_(cast)
                result[name] = cast
    finally:
        for name, original in originals.items():
            modules[name].weight.copy_(original)
        for module, mode in training.items():
            module.training = mode
    return {f"{name}.weight" if name else "weight": result[name] for name in modules}


class _Seen(Exception):
    """Ends a forward pass behind the layer of interest."""


class _Passes:
    """Forward passes over the calibration batches that watch what enters linear layers."""

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Linear], batches: list[Any], forward: Callable[..., Any]
    ) -> None:
        self.model, self.modules, self.batches, self.forward = model, modules, batches, forward
        self.calls: list[Counter[str]] = []  # per batch, how often each layer runs

    def _run(self, batch: Any, names: Iterable[str], seen: Callable[[str, Tensor], None]) -> None:
        def hook(name: str) -> Callable[..., None]:
            return lambda module, args, kwargs: seen(name, args[0] if args else kwargs["input"])

        handles = [self.modules[name].register_forward_pre_hook(hook(name), with_kwargs=True) for name in names]
        try:
            with suppress(_Seen):
                self.forward(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()

    def stages(self) -> list[list[str]]:
        """Return the layers in the order in which they run, those with one common input together."""
        stages: list[list[str]] = []
        for batch in self.batches:
            calls: Counter[str] = Counter()
            last: list[Tensor] = []  # held, so that no other tensor takes its place in memory

            def seen(name: str, x: Tensor, calls: Counter[str] = calls, last: list[Tensor] = last) -> None:
                if not any(name in stage for stage in stages):
                    if last and last[0] is x:
                        stages[-1].append(name)
                    else:
                        stages.append([name])
                calls[name] += 1
                last[:] = [x]

            self._run(batch, self.modules, seen)
            self.calls.append(calls)
        if idle := [name for name in self.modules if not any(name in stage for stage in stages)]:
            raise ConfigError(f"{idle[0]}: got a layer that no calibration batch reaches, expected a filter without it")
        often = {name for calls in self.calls for name in calls if calls[name] > 1}
        return [part for stage in stages for part in ([[n] for n in stage] if often & {*stage} else [stage])]

    def hessian(self, name: str) -> Tensor:
        """Return 2 X^T X of a layer's inputs, float64."""
        size = self.modules[name].in_features
        total = torch.zeros(size, size, dtype=torch.float64, device=self.modules[name].weight.device)
        for batch, calls in zip(self.batches, self.calls, strict=True):
            left = calls[name]
            if not left:
                continue

            def seen(name: str, x: Tensor) -> None:
                nonlocal left
                rows = widen(x).reshape(-1, size)
                total.add_(rows.T @ rows, alpha=2)
                left -= 1
                if not left:
                    raise _Seen

            self._run(batch, [name], seen)
        return total


def _forward(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
