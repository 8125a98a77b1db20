"""Parameters that are updated by the same batched kernels: one bucket per layout, step count, device and dtype.

State: none of its own. The state of parameter i lives in the optimizer's ordinary per-parameter dictionaries, but as
row i of one stacked tensor, so that a bucket finds its state stacked without copying and every update is in place.
Whoever replaces those tensors, as offloading does, or freezes some of the parameters, loses only speed: rows that do
not lie behind one another are stacked for the step and copied back after it.

Cost: gradients are stacked by one copy, 2 x bytes of the gradient; a bucket of one parameter copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import torch
from effml_shared import distributed
from effml_shared.errors import ConfigError, NonFiniteError
from torch import Tensor

from effml_optim.matrix.sharding import Owned, local_tensor
from effml_optim.matrix.tensor_merging import Layout

__all__ = ["Bucket", "Member", "checked_gradient"]


@dataclass(frozen=True)
class Member:
    """One parameter in a bucket. `phase`: by how many steps it is ahead in what is done periodically.

    `grad` is an ordinary tensor: all of the gradient, or this rank's shard of it where the rule is elementwise. A
    parameter that is sharded and `owned` is updated elsewhere: its change is collected.
    """

    param: Tensor
    grad: Tensor | None
    state: dict[str, Any]
    name: str
    phase: int = 0
    owned: Owned | None = None

    @property
    def target(self) -> Tensor:
        """What updates are added to."""
        change = self.owned.change if self.owned is not None else None
        return local_tensor(self.param) if change is None else change


@dataclass
class Bucket:
    """Parameters of one `layout` that have all made `step` updates; `step` is None before any state exists."""

    layout: Layout
    step: int | None
    dtype: torch.dtype
    device: torch.device
    members: list[Member] = field(default_factory=list)
    _stacks: dict[str, Tensor] = field(default_factory=dict)
    _borrowed: list[str] = field(default_factory=list)

    def gradients(self, *, maximize: bool = False) -> Tensor:
        """All gradients as (bucket, *layout.shape) in the bucket's dtype; never to be changed in place."""
        rows = [self.layout.merge(m.grad).to(self.dtype) for m in self.members if m.grad is not None]
        stack = rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)
        return stack.neg() if maximize else stack

    def create(self, key: str, stack: Tensor) -> Tensor:
        """Make row i of `stack` the state `key` of member i."""
        stack = stack.contiguous()
        for member, row in zip(self.members, stack.unbind(), strict=True):
            member.state[key] = row
        self._stacks[key] = stack
        return stack

    def zeros(self, key: str, *shape: int) -> Tensor:
        """Create state `key` as zeros (bucket, *shape)."""
        return self.create(key, torch.zeros(len(self.members), *shape, dtype=self.dtype, device=self.device))

    def stack(self, key: str) -> Tensor:
        """State `key` of all members as (bucket, ...), to be updated in place."""
        if key not in self._stacks:
            rows = [member.state[key] for member in self.members]
            if _adjacent(rows):
                self._stacks[key] = rows[0].as_strided(
                    (len(rows), *rows[0].shape), (rows[0].numel(), *rows[0].stride())
                )
            else:
                self._stacks[key] = torch.stack(rows)
                self._borrowed.append(key)
        return self._stacks[key]

    def restack(self) -> None:
        """Move every state tensor of the members into stacks, so that later steps need not copy."""
        for key in self.members[0].state:
            if key != "step":
                self.create(key, torch.stack([member.state[key] for member in self.members]))

    def start(self) -> None:
        """Give every member a step count of zero: a float32 scalar on the host, as torch's own optimizers keep it."""
        for member in self.members:
            member.state["step"] = torch.zeros((), dtype=torch.float32)
        self.step = 0

    def advance(self) -> int:
        """Count one update and return its number, 1 for the first."""
        torch._foreach_add_([member.state["step"] for member in self.members], 1)
        self.step = 1 if self.step is None else self.step + 1
        return self.step

    def row_blocks(self, rows: int) -> Iterator[slice | EllipsisType]:
        """Cut a tall matrix that is alone in its bucket into blocks of so many rows; anything else stays whole.

        What is done block by block stays in the cache. Only for updates in which rows do not meet.
        """
        whole = self.layout.shape
        if len(self.members) > 1 or len(whole) != 2 or tuple(self.members[0].target.shape) != whole:
            yield ...
            return
        yield from (slice(start, start + rows) for start in range(0, whole[0], rows))

    def add_to_parameters(self, update: Tensor, scale: float | Tensor, block: slice | EllipsisType = ...) -> None:
        """Add `scale * update`, (bucket, *layout.shape), to the parameters, or to this block of their rows."""
        if isinstance(scale, Tensor):
            update, scale = update.to(self.dtype) * scale, 1.0
        params = [member.target[block] for member in self.members]
        rows = [self.layout.split(row, p.shape) for row, p in zip(update.unbind(), params, strict=True)]
        torch._foreach_add_(params, rows, alpha=scale)

    def scale_parameters(self, scale: float | Tensor) -> None:
        """Multiply the parameters by `scale`: decoupled weight decay."""
        torch._foreach_mul_([member.target for member in self.members], scale)
        for member in self.members:
            if member.owned is not None:
                member.owned.kept *= float(scale)

    def require_finite(self, factor: Tensor, rows: Iterable[int] | None = None) -> None:
        """Raise a `NonFiniteError` for the first member, of `rows` only if given, whose factor (n, n) is not finite.

        The diagonal decides, because it bounds all other entries of a Gram matrix.
        """
        finite = factor.diagonal(dim1=-2, dim2=-1).isfinite().all(dim=-1).tolist()
        for row in range(len(finite)) if rows is None else rows:
            if not finite[row]:
                what = f"{self.members[row].name}: its factor of size {factor.shape[-1]} is not finite"
                raise NonFiniteError(
                    f"{what} at step {self.step or 0}: a gradient was NaN, infinite or too large to square"
                )

    def close(self) -> None:
        """Copy back state whose rows did not lie behind one another."""
        for key in self._borrowed:
            torch._foreach_copy_([member.state[key] for member in self.members], list(self._stacks[key].unbind()))
        self._stacks.clear()
        self._borrowed.clear()


def _adjacent(rows: Sequence[Tensor]) -> bool:
    first = rows[0]
    start, stride, storage = first.data_ptr(), first.numel() * first.element_size(), first.untyped_storage().data_ptr()
    return all(
        row.is_contiguous() and row.data_ptr() == start + i * stride and row.untyped_storage().data_ptr() == storage
        for i, row in enumerate(rows)
    )


def checked_gradient(param: Tensor, name: str) -> Tensor | None:
    """Return this rank's part of a parameter's gradient as an ordinary dense tensor, or None if it has none.

    Raises:
        ConfigError: the gradient is sparse, complex or not floating point.
    """
    grad = param.grad
    if grad is None:
        return None
    if grad.layout != torch.strided or not grad.is_floating_point():
        kind = "sparse" if grad.layout != torch.strided else str(grad.dtype)
        raise ConfigError(
            f"{name}: got a {kind} gradient, expected a dense floating-point one (for nn.Embedding: sparse=False)"
        )
    if distributed.is_sharded(grad) and distributed.is_sharded(param) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return local_tensor(grad)
