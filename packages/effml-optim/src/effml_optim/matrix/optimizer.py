"""What SOAP, Shampoo and Muon share: the contract of `torch.optim.Optimizer` around an update of whole buckets.

A subclass says how a parameter is laid out, which options are valid and how one bucket is updated. This class owns the
rest: gradients are checked before anything changes, closures run with gradients enabled, ambient autocast is switched
off for the update, groups with `use_adamw=True` run AdamW, and state keeps its own dtype through `load_state_dict`.

Under `torch.compile` the update itself runs eagerly: its buckets and refreshes are decided on the host.

State: plain tensors per parameter under string keys, and a float32 `step` on the host that counts that parameter's own
updates. `state_dict` refers to live state, as in torch: copy it to keep a snapshot. For sharded parameters (FSDP2) see
`sharding`: `step`, `state_dict` and `load_state_dict` are then collective.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from effml_shared import distributed
from effml_shared.checks import check_choice, check_range
from effml_shared.errors import CheckpointError, ConfigError, NonFiniteError
from torch import Tensor
from torch.optim.optimizer import ParamsT

from effml_optim.matrix.adamw import adamw_update
from effml_optim.matrix.buckets import Bucket, Member, checked_gradient
from effml_optim.matrix.sharding import (
    Owned,
    Owners,
    Shards,
    as_dtensor,
    collect,
    deliver,
    local_tensor,
    shards_of,
    show_state,
    whole,
)
from effml_optim.matrix.tensor_merging import Layout

ALONE = 1 << 14  # elements above which batching on a CPU costs a copy of the gradient and wins nothing

__all__ = ["MatrixOptimizer", "state_dtype"]


class MatrixOptimizer(torch.optim.Optimizer):
    """Base of optimizers that update all parameters of one shape together. Subclasses define the hooks below."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._owners = Owners()
        super().__init__(params, defaults)

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

    def phases(self, group: dict[str, Any], layouts: list[Layout]) -> Sequence[int]:
        """Return by how many steps each parameter of the group is ahead in what is done periodically."""
        return [0] * len(layouts)

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
            ConfigError: a gradient is sparse or not real floating point, or a parameter is sharded along more than one
                mesh dimension; nothing changed.
            NonFiniteError: a factor is not finite; names the parameter. No sharded parameter has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update_all()
        return loss

    @torch._disable_dynamo  # as torch.optim does; torch.compiler.disable would import the compiler, for seconds, here
    def _update_all(self) -> None:
        owned = self._collect_gradients()
        failure = None
        try:
            for group, bucket in list(self.buckets(owned)):  # checks all gradients before the first update
                with torch.autocast(bucket.device.type, enabled=False):
                    (adamw_update if group["use_adamw"] else self.update_bucket)(group, bucket)
                bucket.close()
        except NonFiniteError as error:
            if not owned:
                raise
            failure = error  # the other ranks wait to be told
        if owned:
            self._deliver_changes(owned, failure)

    def _collect_gradients(self) -> dict[Tensor, Owned]:
        """Bring gradients of sharded matrices to their owners; returns what this step has to deliver."""
        sharded = list(self._sharded_matrices())
        if not sharded:
            return {}
        self._owners.assign((param, shards, _cost(layout)) for _, param, shards, layout, _ in sharded)
        items, gradients = [], []
        for group, param, shards, _, name in sharded:
            if (gradient := checked_gradient(param, name)) is not None:
                items.append(Owned(param, shards, self._owners.of(param), state_dtype(group, param)))
                gradients.append(gradient)
        collect(items, gradients)
        return {item.param: item for item in items}

    def _deliver_changes(self, owned: dict[Tensor, Owned], failure: NonFiniteError | None) -> None:
        for item in owned.values():
            if item.change is not None and failure is None:
                item.step = int(self.state[item.param]["step"])
        fine = deliver(list(owned.values()), failed=failure is not None)
        if failure is not None:
            raise failure
        if not fine:
            raise NonFiniteError("the update failed on another rank; its own message says why")
        for item in owned.values():
            if item.change is None:  # others count along
                self.state[item.param]["step"] = torch.tensor(float(item.step))

    def _sharded_matrices(self) -> Iterator[tuple[dict[str, Any], Tensor, Shards, Layout, str]]:
        for number, group in enumerate(self.param_groups):
            for position, param in enumerate(group["params"] if not group["use_adamw"] else ()):
                name = self._name(number, position)
                if param.numel() and (shards := shards_of(param, name)) is not None:
                    yield group, param, shards, self.layout(group, param.shape), name

    def buckets(self, owned: Mapping[Tensor, Owned] | None = None) -> Iterator[tuple[dict[str, Any], Bucket]]:
        """Yield (group, bucket) over what this rank updates: all that has a gradient, given the sharded ones' `owned`.

        Without `owned`, over all whose state this rank has.
        """
        for number, group in enumerate(self.param_groups):
            found: dict[Any, Bucket] = {}
            layouts = [self._layout(group, param) for param in group["params"]]
            phases = self.phases(group, layouts)
            for position, (param, layout, phase) in enumerate(zip(group["params"], layouts, phases, strict=True)):
                if param.numel() == 0:
                    continue
                state, name = self.state.get(param, {}), self._name(number, position)
                item = owned.get(param) if owned is not None else None
                if owned is None:
                    grad, skip = None, len(state) < 2  # a rank that does not own it only counts its steps
                else:
                    grad = item.gradient if item is not None else checked_gradient(param, name)
                    skip = grad is None
                if skip:
                    continue
                dtype = state_dtype(group, param)
                step = int(state["step"]) if state else None
                alone = group.get("foreach") is False or (param.device.type == "cpu" and param.numel() > ALONE)
                key = position if alone else (layout, step, dtype, param.device)
                bucket = found.setdefault(key, Bucket(layout, step, dtype, param.device))
                bucket.members.append(Member(param, grad, self.state[param], name, phase, item))
            for bucket in found.values():
                yield group, bucket

    def _layout(self, group: dict[str, Any], param: Tensor) -> Layout:
        return Layout(tuple(local_tensor(param).shape)) if group["use_adamw"] else self.layout(group, param.shape)

    def _name(self, group: int, position: int) -> str:
        names = self.param_groups[group].get("param_names")
        return names[position] if names else f"param_groups[{group}]['params'][{position}]"

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups as torch's optimizers do, the state of sharded parameters as DTensors."""
        saved = super().state_dict()
        owned: dict[int, tuple[Shards, int, dict[str, Any]]] = {}
        for group, ids in zip(self.param_groups, saved["param_groups"], strict=True):
            for key, param in zip(ids["params"], group["params"], strict=True):
                state, shards = saved["state"].get(key), shards_of(param)
                if not state or shards is None:
                    continue
                if group["use_adamw"]:
                    saved["state"][key] = {
                        name: value if name == "step" else as_dtensor(value, shards, param.shape)
                        for name, value in state.items()
                    }
                else:
                    owned[key] = (shards, self._owners.of(param), state)
        saved["state"].update(zip(owned, show_state(list(owned.values())), strict=True))
        return saved

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
        self._owners.assign((p, shards, _cost(layout)) for _, p, shards, layout, _ in self._sharded_matrices())
        saved = chain.from_iterable(group["params"] for group in incoming["param_groups"])
        params = ((group, param) for group in self.param_groups for param in group["params"])
        for key, (group, param) in zip(saved, params, strict=True):
            entry = incoming["state"].get(key, {})
            for name in entry.keys() & {"exp_avg", "momentum_buffer"}:
                if entry[name].numel() != param.numel():
                    raise CheckpointError(
                        f"{name} of parameter {key} has {entry[name].numel()} elements, expected {param.numel()}"
                    )
            if entry:
                self.state[param] = self._own_part(group, param, entry)
        for _, bucket in self.buckets():
            bucket.restack()

    def union(self, report: dict[str, Any]) -> dict[str, Any]:
        """Return what all ranks report of the parameters they own (collective if any is sharded)."""
        if not any(True for _ in self._sharded_matrices()):
            return report
        reports: list[Any] = [None] * distributed.world_size()
        torch.distributed.all_gather_object(reports, report)
        return {name: value for some in reports for name, value in some.items()}

    def _own_part(self, group: dict[str, Any], param: Tensor, entry: dict[str, Any]) -> dict[str, Any]:
        """Copy what this rank keeps of a parameter's loaded state."""
        shards, own = shards_of(param), {}
        for name, value in entry.items():
            if not isinstance(value, Tensor) or name == "step":
                own[name] = value.to("cpu", copy=True) if isinstance(value, Tensor) else value
                continue
            tensor = whole(value)
            if shards is not None and group["use_adamw"]:
                tensor = tensor.narrow(shards.dim, *shards.extent(param.shape[shards.dim], shards.rank))
            elif shards is not None and self._owners.of(param) != shards.rank:
                continue
            own[name] = tensor.to(param.device, copy=True)
        return own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch adds it for its own optimizers; ours have no such option
        self.__dict__.setdefault("_owners", Owners())  # a copy of an optimizer
        for group in self.param_groups:  # options younger than the checkpoint
            for name, default in self.defaults.items():
                group.setdefault(name, default)


def _cost(layout: Layout) -> float:
    """Return what an update costs, up to a factor: products along every axis that has one."""
    sizes = [layout.shape[axis] for axis in layout.axes] or [min(layout.shape, default=1)]
    return float(math.prod(layout.shape) * sum(sizes))


def state_dtype(group: dict[str, Any], param: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's state and arithmetic: its own, but at least `precond_dtype` or float32."""
    return torch.promote_types(param.dtype, getattr(torch, group.get("precond_dtype", "float32")))
