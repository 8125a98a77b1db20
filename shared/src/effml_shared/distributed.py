"""Several processes: start-up under `torchrun`, DDP and FSDP2 wrapping, and the few collectives the core needs.

There is no engine here: `torchrun` starts the processes, DDP and `fully_shard` do the work, and
torch.distributed.checkpoint stores what is sharded (as safetensors). In one process every function is a no-op.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
import torch.distributed as dist
from torch import nn

from effml_shared.errors import CheckpointError, ConfigError, EffmlError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = [
    "agreed",
    "default_device",
    "describe_sharded",
    "from_main",
    "is_main",
    "is_sharded",
    "launched",
    "load_sharded",
    "mesh_of",
    "parallelize",
    "rank",
    "reduce_max",
    "reduce_sum",
    "save_sharded",
    "shard_like",
    "world_size",
]


def rank() -> int:
    """Return this process's rank, 0 in a single process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes, 1 in a single process."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Say whether this process does the reading and writing for all."""
    return rank() == 0


def default_device() -> torch.device:
    """Return this process's device: its local GPU where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextlib.contextmanager
def launched() -> Iterator[torch.device]:
    """Join the process group that `torchrun` announces (nccl on GPUs, gloo on CPUs) and leave it at the end."""
    device = default_device()
    if "RANK" not in os.environ or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
        dist.barrier()  # a rank that leaves early would tear down connections that others still use
    finally:
        gc.collect()  # DDP's reducer keeps the group's threads alive, and a process that ends with them aborts
        dist.destroy_process_group()


def parallelize(model: nn.Module, strategy: str, *, blocks: type[nn.Module] | None = None) -> nn.Module:
    """Make a model data-parallel over all processes; a single process gets it back unchanged.

    Args:
        model: on its device.
        strategy: `"ddp"` (replicas) or `"fsdp"` (parameters, gradients and optimizer state sharded by rows).
        blocks: with `"fsdp"`, modules of this class are sharded one by one, so that only one is whole at a time.

    Build the optimizer after this call: FSDP2 replaces the parameters.
    """
    if strategy not in ("ddp", "fsdp"):
        raise ConfigError(f"strategy: got {strategy!r}, expected 'ddp' or 'fsdp'")
    if world_size() == 1:
        return model
    if strategy == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    for module in model.modules() if blocks is not None else ():
        if blocks is not None and isinstance(module, blocks):
            fully_shard(module, mesh=mesh)
    return cast(nn.Module, fully_shard(model, mesh=mesh))


def mesh_of(model: nn.Module) -> DeviceMesh | None:
    """Return the device mesh over which a model's parameters are sharded, or None."""
    return next((p.device_mesh for p in model.parameters() if is_sharded(p)), None)


def _device() -> torch.device:
    return default_device() if dist.get_backend() == "nccl" else torch.device("cpu")


def reduce_sum(*values: float) -> list[float]:
    """Add up numbers over all ranks, in one collective."""
    return _reduce(values, "sum")


def reduce_max(*values: float) -> list[float]:
    """Take the largest of each number over all ranks, in one collective."""
    return _reduce(values, "max")


def _reduce(values: tuple[float, ...], operation: str) -> list[float]:
    if world_size() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(tensor, dist.ReduceOp.SUM if operation == "sum" else dist.ReduceOp.MAX)
    return tensor.tolist()


def from_main(value: int) -> int:
    """Give every rank the main rank's number."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.int64, device=_device())
    dist.broadcast(tensor, src=0)
    return int(tensor)


@contextlib.contextmanager
def agreed(purpose: str) -> Iterator[None]:
    """Wait for all ranks at the end of the block; when it failed on one rank, fail on all instead of hanging."""
    failed = 1
    try:
        yield
        failed = 0
    finally:
        (others,) = reduce_max(failed)
    if others:
        raise EffmlError(f"{purpose} failed on another rank; its own message says why")


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Say whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # takes seconds to import; until then there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def shard_like(value: Any, reference: torch.Tensor) -> Any:
    """Distribute a whole tensor as `reference` is; anything else comes back unchanged."""
    if not is_sharded(reference) or not isinstance(value, torch.Tensor) or is_sharded(value):
        return value
    if value.shape != reference.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)


def describe_sharded(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return, as JSON, what `load_sharded` must know: global shape, dtype and sharded dimension (-1: replicated)."""
    return {
        name: [list(t.shape), str(t.dtype).removeprefix("torch."), getattr(t.placements[0], "dim", -1)]
        for name, t in tensors.items()
    }


def save_sharded(tensors: dict[str, Any], directory: Path) -> None:
    """Write DTensors through torch.distributed.checkpoint, each rank its own shards, as safetensors.

    Raises:
        OSError: some rank's shards cannot be written.
    """
    if tensors:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        try:
            dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(directory), save_distributed=True))
        except CheckpointException as error:  # no Exception: nobody above would catch it
            failures = [failure for failure, _ in error.failures.values()]
            raise OSError(str(failures[0]).splitlines()[0]) from None


def load_sharded(described: dict[str, Any], directory: Path, mesh: DeviceMesh | None) -> dict[str, torch.Tensor]:
    """Read what `save_sharded` wrote: sharded over `mesh`, whatever its size, or whole where there is none."""
    if not described:
        return {}
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor import empty as empty_dtensor

    tensors: dict[str, torch.Tensor] = {}
    for name, (shape, dtype, dim) in described.items():
        placement = [Shard(dim) if dim >= 0 else Replicate()]
        kind = getattr(torch, dtype)
        if mesh is None:
            tensors[name] = torch.empty(shape, dtype=kind)
        else:
            tensors[name] = empty_dtensor(shape, dtype=kind, device_mesh=mesh, placements=placement)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is meant
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(directory)))
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{directory}: got shards that cannot be read ({str(error).splitlines()[0]})") from None
    return tensors
