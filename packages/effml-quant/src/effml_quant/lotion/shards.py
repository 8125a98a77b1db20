"""Blocks of a weight that is sharded over processes (DTensor, FSDP2).

FSDP2 shards by rows, so blocks within a row, or a row each, are local. A block that spans the shards, such as the whole
tensor, needs its largest magnitude and two sums from all of them: two collectives of a few numbers per weight.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from effml_shared import distributed
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_quant.lotion.penalty import Reduce
from effml_quant.quantizer import Quantizer

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["reducer", "share"]


def reducer(w: Tensor, q: Quantizer) -> Reduce | None:
    """Return how to combine the blocks of w over its shards, or None where every block is local.

    Raises:
        ConfigError: the shards cut through blocks that are not the whole tensor or a channel.
    """
    if not distributed.is_sharded(w):
        return None
    if any(p.is_partial() for p in w.placements):
        raise ConfigError("w: got a DTensor of partial sums, expected a sharded or replicated one")
    spanning = _spanning(w, q)
    if not spanning:
        return None
    if q.block not in ("tensor", "channel"):
        got = f"blocks of {q.block} along a sharded axis"
        raise ConfigError(f"granularity: got {got}, expected blocks along another axis, 'channel' or 'tensor'")
    groups = [w.device_mesh.get_group(i) for i in spanning]

    def reduce(values: Tensor, operation: str) -> Tensor:
        values = values.clone(memory_format=torch.contiguous_format)
        for group in groups:
            dist.all_reduce(values, dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM, group=group)
        return values

    return reduce


def share(w: Tensor, q: Quantizer) -> float:
    """Return by what to multiply a sum over w's blocks, so that all processes' products add up to the whole."""
    if not distributed.is_sharded(w) or _spanning(w, q):
        return 1 / distributed.world_size()
    sizes = [w.device_mesh.size(i) for i, p in enumerate(w.placements) if p.is_replicate()]
    return 1 / math.prod(sizes)


def _spanning(w: DTensor, q: Quantizer) -> list[int]:
    """Return the axes of the mesh over which a block of w is spread."""
    block, last = q.block, w.ndim - 1
    if block == "tensor":
        inside = set(range(w.ndim))
    elif block == "channel":
        inside = set(range(1, w.ndim))
    else:
        inside = {last - 1, last} if isinstance(block, tuple) else {q.axis % w.ndim}
    return [i for i, p in enumerate(w.placements) if getattr(p, "dim", None) in inside]
