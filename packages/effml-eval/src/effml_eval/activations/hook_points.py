"""What a module inside a model computes, named by a string: `"model.layers.3"`, or `"model.layers.3.mlp:input"`.

The names are those of `named_modules()`, in anybody's model; without a suffix the output is meant. The forward pass is
left as soon as everything asked for has been seen, so layers above cost nothing, nor does a language model's head.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.generation import evaluating, unwrap
from effml_shared.tensors import widen
from torch import Tensor, nn

__all__ = ["ModuleActivations", "hidden_states"]


class _SeenAll(Exception):
    """Leave a forward pass of which nothing more is wanted."""


@torch.no_grad()
def hidden_states(model: nn.Module, batch: Any, hook_points: Sequence[str]) -> dict[str, Tensor]:
    """Return what a model in evaluation mode computes at hook points, each the first time it comes there.

    Args:
        model: on its device.
        batch: a tensor, or a mapping of which the model gets what its `forward` has names for, but for `labels`.
        hook_points: names of modules, with `:input` behind them for their first argument.

    Raises:
        ConfigError: there is no such module, the model does not call it, or it has no tensor there.
    """
    model = unwrap(model)
    seen: dict[str, Tensor] = {}
    handles = []

    def watch(name: str, module: nn.Module, side: str) -> None:
        def keep(value: Any) -> None:
            if name not in seen:
                seen[name] = _tensor(name, value)
            if len(seen) == len(set(hook_points)):
                raise _SeenAll

        def before(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            keep(inputs[0] if inputs else next(iter(named.values()), None))

        if side == "input":
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(lambda _, inputs, output: keep(output)))

    try:
        for name in dict.fromkeys(hook_points):
            watch(name, *_find(model, name))
        with evaluating(model):
            _call(model, batch)
    except _SeenAll:
        pass  # raised above: the rest of the forward pass is of no use
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in hook_points if name not in seen]
    if missing:
        raise ConfigError(f"hook_point: got {missing[0]!r}, which the model does not call, expected one that it does")
    return seen


class ModuleActivations:
    """Make rows (n, d) of what a module computes for each position of a batch, padding left out.

    Args:
        model: on its device; anything with modules.
        hook_point: see `hidden_states`.

    Raises:
        ConfigError: there is no such module.
    """

    def __init__(self, model: nn.Module, hook_point: str) -> None:
        _find(unwrap(model), hook_point)
        self.model, self.hook_point = model, hook_point

    def __call__(self, batch: Any) -> Tensor:
        """Return the rows, float32 (float64, if the model computes in that), on the model's device.

        A batch's `attention_mask`, of the shape of all but the last dimension, says which positions count.

        Raises:
            ConfigError: as `hidden_states`.
            NonFiniteError: a row holds NaN or infinity.
        """
        states = widen(hidden_states(self.model, batch, [self.hook_point])[self.hook_point])
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and mask.shape == states.shape[:-1]:
            rows = states[mask.to(states.device).bool()]
        else:
            rows = states.flatten(0, -2)
        if not bool(rows.isfinite().all()):
            raise NonFiniteError(f"{self.hook_point}: got NaN or infinity among the activations, expected finite ones")
        return rows


def _find(model: nn.Module, hook_point: str) -> tuple[nn.Module, str]:
    name, _, side = hook_point.partition(":")
    modules = dict(model.named_modules())
    if side not in ("", "input", "output"):
        raise ConfigError(f"hook_point: got {hook_point!r}, expected nothing, ':input' or ':output' behind the module")
    if name not in modules:
        near = difflib.get_close_matches(name, modules)
        hint = f" (nearest: {', '.join(near)})" if near else ""
        raise ConfigError(f"hook_point: got {name!r}{hint}, expected one of the model's {len(modules)} modules")
    return modules[name], side or "output"


def _tensor(name: str, value: Any) -> Tensor:
    """Return the tensor in what a module takes or gives: layers may wrap it in tuples and named outputs."""
    if isinstance(value, Mapping):
        value = next(iter(value.values()), None)
    while isinstance(value, tuple | list) and value:
        value = value[0]
    if not isinstance(value, Tensor) or value.ndim < 2 or not value.is_floating_point():
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ConfigError(f"hook_point: got {got} at {name!r}, expected a floating-point tensor (batch, ..., d)")
    return value.detach()


def _call(model: nn.Module, batch: Any) -> None:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Tensor):
        model(batch.to(device))
        return
    accepted = set(inspect.signature(model.forward).parameters) - {"labels"}
    given = {name: value for name, value in batch.items() if name in accepted}
    if not given:
        raise ConfigError(f"batch: got {sorted(batch)}, expected names of the arguments of {type(model).__name__}")
    model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()})
