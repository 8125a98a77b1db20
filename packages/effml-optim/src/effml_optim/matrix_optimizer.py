"""What SOAP, Shampoo and Muon share: the contract of `torch.optim.Optimizer` around an update of whole buckets.

A subclass says how a parameter is laid out, which options are valid and how one bucket is updated. This class owns the
rest: gradients are checked before anything changes, closures run with gradients enabled, ambient autocast is switched
off for the update, groups with `use_adamw=True` run AdamW, and state keeps its own dtype through `load_state_dict`.

Under `torch.compile` the update itself runs eagerly: its buckets and refreshes are decided on the host.

State: plain tensors per parameter under string keys, and a float32 `step` on the host that counts that parameter's own
updates. `state_dict` refers to live state, as in torch: copy it to keep a snapshot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from effml_shared.errors import CheckpointError, ConfigError
from torch import Tensor

from effml_optim.adamw import adamw_update
from effml_optim.buckets import Bucket, Member, checked_gradient
from effml_optim.tensor_merging import Layout

__all__ = ["MatrixOptimizer", "check_choice", "check_count", "check_range", "state_dtype"]


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of optimizers that update all parameters of one shape together. Subclasses define the three hooks below."""

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise a `ConfigError` that names the first invalid option of `group`."""
        if isinstance(lr := group["lr"], Tensor):
            if lr.numel() != 1:
                raise ConfigError(f"lr: got a tensor of {lr.numel()} elements, expected 1")
            group["lr"] = lr.reshape(())
        check_range("lr", float(lr), 0.0)
        check_range("weight_decay", group["weight_decay"], 0.0)
        check_range("eps", group["eps"], 0.0)
        if len(group["betas"]) != 2:
            raise ConfigError(f"betas: got {len(group['betas'])} numbers, expected 2")
        for i, beta in enumerate(group["betas"]):
            check_range(f"betas[{i}]", beta, 0.0, 1.0)
        if "precond_dtype" in group:  # kept as a string: safe in any checkpoint
            group["precond_dtype"] = str(group["precond_dtype"]).removeprefix("torch.")
            check_choice("precond_dtype", group["precond_dtype"], ("float32", "float64"))

    def layout(self, group: dict[str, Any], shape: torch.Size) -> Layout:
        """Return how a parameter of this shape is laid out."""
        raise NotImplementedError

    def update_bucket(self, group: dict[str, Any], bucket: Bucket) -> None:
        """Update the parameters and the state of one bucket, creating the state if `bucket.step` is None."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options it does not name take their defaults.

        Raises:
            ConfigError: an option is invalid; the group is not added.
        """
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
        except ConfigError:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient and return the closure's loss, if there is a closure.

        Raises:
            ConfigError: a gradient is sparse or not real floating point, or a parameter is sharded; nothing changed.
            NonFiniteError: a factor is not finite; names the parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_all()
        return loss

    @torch._disable_dynamo  # as torch.optim does; torch.compiler.disable would import the compiler, for seconds, here
    def _update_all(self) -> None:
        for group, bucket in list(self.buckets(with_gradient=True)):  # checks all gradients before the first update
            with torch.autocast(bucket.device.type, enabled=False):
                (adamw_update if group["use_adamw"] else self.update_bucket)(group, bucket)
            bucket.close()

    def buckets(self, *, with_gradient: bool) -> Iterator[tuple[dict[str, Any], Bucket]]:
        """Yield (group, bucket) over all parameters that have a gradient, or else over all that have state."""
        for number, group in enumerate(self.param_groups):
            together = group.get("foreach") is not False
            found: dict[Any, Bucket] = {}
            phases: Counter[Layout] = Counter()
            for position, param in enumerate(group["params"]):
                if param.numel() == 0:
                    continue
                layout = Layout(tuple(param.shape)) if group["use_adamw"] else self.layout(group, param.shape)
                phase, state = phases[layout], self.state.get(param, {})
                phases[layout] += 1
                name = self._name(number, position)
                grad = checked_gradient(param, name) if with_gradient else None
                if (grad is None) if with_gradient else not state:
                    continue
                dtype = state_dtype(group, param)
                step = int(state["step"]) if state else None
                key = (layout, step, dtype, param.device) if together else position
                bucket = found.setdefault(key, Bucket(layout, step, dtype, param.device))
                bucket.members.append(Member(param, grad, self.state[param], name, phase))
            for bucket in found.values():
                yield group, bucket

    def _name(self, group: int, position: int) -> str:
        names = self.param_groups[group].get("param_names")
        return names[position] if names else f"param_groups[{group}]['params'][{position}]"

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict`, every tensor in the dtype it was saved in (torch would cast to the parameter's).

        Raises:
            CheckpointError: a momentum does not have the size of its parameter.
        """
        incoming: dict[str, Any] = {}
        # Registered last, so that it sees what the user's own hooks made of the dict.
        hook = self.register_load_state_dict_pre_hook(lambda _, loaded: incoming.update(loaded))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        saved = chain.from_iterable(group["params"] for group in incoming["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(saved, params, strict=True):
            for name, value in incoming["state"].get(key, {}).items():
                if name in ("exp_avg", "momentum_buffer") and value.numel() != param.numel():
                    raise CheckpointError(
                        f"{name} of parameter {key} has {value.numel()} elements, expected {param.numel()}"
                    )
                device = "cpu" if name == "step" else param.device
                self.state[param][name] = value.to(device, copy=True) if isinstance(value, Tensor) else value
        for _, bucket in self.buckets(with_gradient=False):
            bucket.restack()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # options younger than the checkpoint
            for name, default in self.defaults.items():
                group.setdefault(name, default)


def state_dtype(group: dict[str, Any], param: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state and arithmetic: its own, but at least `precond_dtype` or float32."""
    return torch.promote_types(param.dtype, getattr(torch, group.get("precond_dtype", "float32")))


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise a `ConfigError` naming the argument unless low <= value < high.

    >>> check_range("eps", -1.0, 0.0)
    Traceback (most recent call last):
    ...
    effml_shared.errors.ConfigError: eps: got -1.0, expected a number in [0.0, inf)
    """
    if not low <= value < high:
        raise ConfigError(f"{name}: got {value}, expected a number in [{low}, {high})")


def check_count(name: str, value: Any, low: int) -> None:
    """Raise a `ConfigError` naming the argument unless `value` is an integer of at least `low`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ConfigError(f"{name}: got {value!r}, expected an integer of at least {low}")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise a `ConfigError` naming the argument unless `value` is one of `choices`."""
    choices = list(choices)
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ConfigError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, choices))}")
