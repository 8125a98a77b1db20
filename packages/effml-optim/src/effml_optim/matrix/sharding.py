"""Matrix optimizers on sharded parameters (FSDP2, DTensor): each matrix is updated, whole, by the rank that owns it.

A rotation or an orthogonalisation mixes all rows of a gradient, so a rank cannot update its own rows alone, and
preconditioning each rank's rows by themselves would be another algorithm on every world size. Here the shards of each
gradient travel to its owner, the owner makes the ordinary update with ordinary state, and the change travels back to
where the rows live: the same weights on any number of ranks. Owners are dealt out by cost, the dearest matrix first,
each to the rank with the least work. Elementwise rules (AdamW groups) stay local and send nothing.

State: the owner has all of a matrix's state, other ranks its step count. A `state_dict` shows state as DTensors on the
parameter's own mesh, sharded by rows, so that torch.distributed.checkpoint and any other world size can read it; making
and loading one is collective. Cost per step: 2 mn words per matrix in two all-to-alls, as much as a reduce-scatter and
an all-gather, and one all-reduce of three numbers per matrix, which waits for the update.

Meshes of more dimensions are fine if one of them shards and the others replicate (HSDP): each replica updates for
itself. Source: the owner scheme is that of Anil et al., arXiv 2002.09018, section 5, and Shi et al., arXiv 2309.06497.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from effml_shared import distributed
from effml_shared.errors import ConfigError
from torch import Tensor

__all__ = [
    "Owned",
    "Owners",
    "Shards",
    "as_dtensor",
    "collect",
    "deliver",
    "local_tensor",
    "shards_of",
    "show_state",
    "whole",
]


@dataclass(frozen=True)
class Shards:
    """How tensors are cut: along dimension `dim`, over dimension `mesh_dim` of `mesh`."""

    mesh: Any
    mesh_dim: int
    dim: int

    @property
    def group(self) -> Any:
        """The process group over which one tensor is spread."""
        return self.mesh.get_group(self.mesh_dim)

    @property
    def rank(self) -> int:
        """This process's place in the group."""
        return int(self.mesh.get_local_rank(self.mesh_dim))

    @property
    def world_size(self) -> int:
        """Number of ranks in the group."""
        return int(self.mesh.size(self.mesh_dim))

    def extent(self, n: int, rank: int) -> tuple[int, int]:
        """Start and length of a rank's share of n rows: equal chunks, the last ones shorter or empty."""
        chunk = -(-n // self.world_size)
        start = min(rank * chunk, n)
        return start, min(chunk, n - start)

    def shape(self, whole: Sequence[int], rank: int) -> tuple[int, ...]:
        """Shape of a rank's shard of a tensor of shape `whole`."""
        return (*whole[: self.dim], self.extent(whole[self.dim], rank)[1], *whole[self.dim + 1 :])

    def rows(self) -> Shards:
        """The same ranks, cutting along dimension 0."""
        return Shards(self.mesh, self.mesh_dim, 0)


def shards_of(param: Tensor, name: str = "parameter") -> Shards | None:
    """Return how a parameter is cut, None if this rank has all of it.

    Raises:
        ConfigError: it is cut along more than one mesh dimension (tensor parallelism), or unevenly interleaved.
    """
    placements = getattr(param, "placements", ())
    cut = [number for number, placement in enumerate(placements) if not placement.is_replicate()]
    if not cut:
        return None
    if len(cut) > 1 or type(placements[cut[0]]).__name__ != "Shard":
        raise ConfigError(
            f"{name}: got placements {tuple(placements)}, expected one Shard and otherwise Replicate (FSDP2 or HSDP)"
        )
    return Shards(param.device_mesh, cut[0], placements[cut[0]].dim)  # type: ignore[attr-defined]


@dataclass
class Owned:
    """One sharded parameter in one step, on every rank; `gradient` and `change` are whole, on the owner alone.

    The update in the making is `parameter * kept + change`, the change in `dtype`; `step` counts it already.
    """

    param: Tensor
    shards: Shards
    owner: int
    dtype: torch.dtype
    gradient: Tensor | None = None
    change: Tensor | None = None
    kept: float = 1.0
    step: int = 0


class Owners:
    """Who owns which parameter: dealt out once, on every rank alike, and remembered."""

    def __init__(self) -> None:
        self._owner: dict[Tensor, int] = {}
        self._load: dict[tuple[Any, int], list[float]] = {}

    def assign(self, params: Iterable[tuple[Tensor, Shards, float]]) -> None:
        """Give every (parameter, shards, cost) that has none an owner: dearest first, to the rank with least work."""
        new = [entry for entry in params if entry[0] not in self._owner]
        for param, shards, cost in sorted(new, key=lambda entry: -entry[2]):  # a stable sort: the same on all ranks
            load = self._load.setdefault((shards.mesh, shards.mesh_dim), [0.0] * shards.world_size)
            owner = load.index(min(load))
            load[owner] += cost
            self._owner[param] = owner

    def of(self, param: Tensor) -> int:
        """Return the rank, within the group of the parameter's shards, that owns it."""
        return self._owner[param]


def collect(items: Sequence[Owned], gradients: Sequence[Tensor]) -> None:
    """Bring each item's gradient, given as this rank's shard, to its owner, and make it a `change` of zeros there."""
    for (_, shards), some in _groups(
        list(zip(items, gradients, strict=True)), lambda entry: (entry[1].dtype, entry[0].shards)
    ):
        ranks, me = range(shards.world_size), shards.rank
        send = [[local for item, local in some if item.owner == rank] for rank in ranks]
        mine = [item for item, _ in some if item.owner == me]
        shapes = [[item.shards.shape(item.param.shape, rank) for item in mine] for rank in ranks]
        pieces = _exchange(shards.group, send, shapes, some[0][1])
        for number, item in enumerate(mine):
            item.gradient = torch.cat([pieces[rank][number] for rank in ranks], dim=item.shards.dim)
            item.change = torch.zeros_like(item.gradient, dtype=item.dtype)


def deliver(items: Sequence[Owned], *, failed: bool) -> bool:
    """Apply each item's change where its shards live; if `failed` on any rank, apply nothing and return False.

    On every rank `kept` and `step` become those of the owner.
    """
    fine = True
    for (dtype, shards), some in _groups(items, lambda item: (item.dtype, item.shards)):
        numbers = [(item.kept, float(item.step)) if item.owner == shards.rank else (0.0, 0.0) for item in some]
        told = torch.tensor([(float(failed), 0.0), *numbers], dtype=torch.float64).to(some[0].param.device)
        dist.all_reduce(told, group=shards.group)
        (failures, _), *numbers = told.tolist()
        fine &= failures == 0
        if failures:
            continue
        changes = spread([(item.change, item.shards, item.owner, item.param.shape) for item in some], dtype)
        for item, change, (kept, step) in zip(some, changes, numbers, strict=True):
            item.kept, item.step = kept, int(step)
            local = local_tensor(item.param)
            if item.kept != 1.0:
                local.mul_(item.kept)
            local.add_(change)
    return fine


def spread(tensors: Sequence[tuple[Tensor | None, Shards, int, Sequence[int]]], dtype: torch.dtype) -> list[Tensor]:
    """Send whole tensors of one dtype from their owners to all ranks and return this rank's shard of each.

    Args:
        tensors: (the tensor, on its owner; how to cut it; its owner; its shape), all over the same ranks.
    """
    shards = tensors[0][1]
    ranks, me, device = range(shards.world_size), shards.rank, torch.device(shards.mesh.device_type)
    send = [
        [
            whole.narrow(cut.dim, *cut.extent(shape[cut.dim], rank))
            for whole, cut, _, shape in tensors
            if whole is not None
        ]
        for rank in ranks
    ]
    shapes = [[cut.shape(shape, me) for _, cut, owner, shape in tensors if owner == rank] for rank in ranks]
    reference = next((whole for whole, *_ in tensors if whole is not None), torch.empty(0, dtype=dtype, device=device))
    pieces = [iter(some) for some in _exchange(shards.group, send, shapes, reference)]
    return [next(pieces[owner]) for _, _, owner, _ in tensors]


def show_state(entries: Sequence[tuple[Shards, int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the state of (shards, owner, state) as DTensors sharded by rows; only the owner's `state` is whole.

    The host's `step`, which every rank has, stays as it is.
    """
    shown = [{"step": state["step"]} for _, _, state in entries]
    by_group: dict[Shards, list[int]] = {}
    for number, (shards, _, _) in enumerate(entries):
        by_group.setdefault(shards.rows(), []).append(number)
    for shards, numbers in by_group.items():
        mine = [
            (number, key, tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for number in numbers
            if entries[number][1] == shards.rank
            for key, value in entries[number][2].items()
            if key != "step"
        ]
        told: list[Any] = [None] * shards.world_size
        dist.all_gather_object(told, mine, group=shards.group)
        everything = sorted(entry for some in told for entry in some)
        for dtype in sorted({name for *_, name in everything}):
            some = [(number, key, shape) for number, key, shape, name in everything if name == dtype]
            tensors = [(entries[n][2].get(key), shards, entries[n][1], shape) for n, key, shape in some]
            for (number, key, shape), local in zip(some, spread(tensors, getattr(torch, dtype)), strict=True):
                shown[number][key] = as_dtensor(local, shards, shape)
    return shown


def as_dtensor(local: Tensor, shards: Shards, shape: Sequence[int]) -> Tensor:
    """Present this rank's shard as a DTensor of the given whole shape on the parameter's mesh."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(shards.dim) if d == shards.mesh_dim else Replicate() for d in range(shards.mesh.ndim)]
    stride = torch.empty(tuple(shape), device="meta").stride()
    local = local.contiguous()
    return DTensor.from_local(local, shards.mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the ordinary tensor behind a DTensor, this rank's shard of it if it is sharded; others as they are."""
    return tensor.to_local() if distributed.is_sharded(tensor) else tensor


def whole(value: Tensor) -> Tensor:
    """Return the whole of a tensor that may be a DTensor (collective then)."""
    return value.full_tensor() if distributed.is_sharded(value) else value


def _exchange(
    group: Any, send: list[list[Tensor]], shapes: list[list[tuple[int, ...]]], reference: Tensor
) -> list[list[Tensor]]:
    """Send tensors to each rank and return those that each rank sent here, which have the given shapes."""
    counts = [[torch.Size(shape).numel() for shape in some] for some in shapes]
    flat = [tensor.reshape(-1) for some in send for tensor in some]
    outgoing = torch.cat(flat) if flat else reference.new_empty(0)
    incoming = reference.new_empty(sum(map(sum, counts)))
    sizes = [sum(tensor.numel() for tensor in some) for some in send]
    dist.all_to_all_single(incoming, outgoing, [sum(some) for some in counts], sizes, group=group)
    pieces = iter(incoming.split([count for some in counts for count in some]))
    return [[next(pieces).view(shape) for shape in some] for some in shapes]


def _groups(entries: Sequence[Any], key: Any) -> list[tuple[Any, list[Any]]]:
    """Group entries by (dtype, ranks), in the order of first appearance: the same on all ranks."""
    found: dict[Any, list[Any]] = {}
    for entry in entries:
        dtype, shards = key(entry)
        found.setdefault((dtype, shards.rows()), []).append(entry)
    return list(found.items())
