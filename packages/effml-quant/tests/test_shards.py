"""Weights sharded over processes: which blocks need a collective, and two ranks of FSDP2 against one process."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from effml_quant import Quantizer
from effml_quant.lotion import Lotion, LotionConfig
from effml_quant.lotion.shards import reducer, share
from effml_shared import distributed
from effml_shared.errors import ConfigError
from torch import nn


class Placement(SimpleNamespace):
    def is_partial(self) -> bool:
        return bool(getattr(self, "partial", False))

    def is_replicate(self) -> bool:
        return not hasattr(self, "dim") and not self.is_partial()


def sharded(*placements: Placement, ndim: int = 2) -> Any:
    """Stand in for a DTensor on a mesh of 2 x 3 x ... processes."""
    mesh = SimpleNamespace(get_group=lambda i: f"group {i}", size=lambda i: i + 2)
    return SimpleNamespace(placements=placements, ndim=ndim, device_mesh=mesh)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    real, calls = distributed.is_sharded, []
    monkeypatch.setattr(distributed, "is_sharded", lambda x: isinstance(x, SimpleNamespace) or real(x))

    def all_reduce(values: torch.Tensor, op: Any, group: str) -> None:
        calls.append(("max" if op == dist.ReduceOp.MAX else "sum", group))
        values.mul_(2)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return calls


ROWS, COLUMNS, COPIES = Placement(dim=0), Placement(dim=1), Placement()


@pytest.mark.parametrize(
    ("placements", "fields", "groups"),
    [
        ([ROWS], {"granularity": "tensor"}, [0]),
        ([ROWS], {"granularity": "channel"}, []),
        ([ROWS], {"block_size": 4}, []),
        ([COLUMNS], {"granularity": "channel"}, [0]),
        ([COPIES, ROWS], {"granularity": "tensor"}, [1]),
        ([ROWS, COLUMNS], {"granularity": "tensor"}, [0, 1]),
        ([COLUMNS], {"block_size": 4, "axis": 0}, []),
    ],
)
def test_collectives_only_where_blocks_span_shards(
    placements: list[Placement], fields: dict[str, Any], groups: list[int], stand_in: list[tuple[str, str]]
) -> None:
    reduce = reducer(sharded(*placements), Quantizer("int4", **fields))
    assert (reduce is None) == (not groups)
    if reduce is not None:
        values = torch.ones(3)
        for operation in ("max", "sum"):
            assert reduce(values, operation).tolist() == [2.0 ** len(groups)] * 3
        assert values.tolist() == [1] * 3
        assert stand_in == [(operation, f"group {i}") for operation in ("max", "sum") for i in groups]


def test_shares_add_up_to_one_count_of_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 6)
    w, by_rows = sharded(COPIES, ROWS), Quantizer("int4", granularity="channel")  # two copies of three shards
    assert share(w, by_rows) == 1 / 2
    assert share(w, Quantizer("int4", granularity="tensor")) == 1 / 6
    assert share(torch.ones(2, 2), by_rows) == 1 / 6


@pytest.mark.parametrize("fields", [{"block_size": 4}, {"block_size": (2, 2)}])
def test_blocks_that_shards_cut(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"granularity: got blocks of .* along a sharded axis"):
        reducer(sharded(COLUMNS), Quantizer("int4", **fields))
    with pytest.raises(ConfigError, match=r"w: got a DTensor of partial sums"):
        reducer(sharded(Placement(partial=True)), Quantizer("int4", **fields))
    assert reducer(torch.ones(2, 2), Quantizer("int4", **fields)) is None


def train(shard: bool, granularity: Any, rank: int = 0, ranks: int = 1) -> tuple[list[torch.Tensor], Lotion]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 3)).double()
    if shard:
        from torch.distributed.fsdp import fully_shard

        fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    lotion = Lotion(net, LotionConfig("int3", granularity))
    lotion.attach(optimizer, 32, clip_norm=0.5)
    for step in range(3):
        x = torch.randn(32, 6, generator=torch.Generator().manual_seed(step)).double().chunk(ranks)[rank]
        optimizer.zero_grad()
        (net(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()
    return [p.full_tensor() if shard else p for p in net.parameters()], lotion  # type: ignore[operator]


def two_ranks(rank: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for granularity in ("tensor", "channel", ("group", 3)):
        expected, whole = train(False, granularity)
        found, parts = train(True, granularity, rank, 2)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        for one, other in zip(whole.report(["int4"]), parts.report(["int4"]), strict=True):
            assert other.gap == pytest.approx(one.gap, rel=1e-9)
            assert other.on_grid == one.on_grid
        parts.load_state_dict(whole.state_dict())  # saved by one process
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_are_one_process() -> None:
    mp.spawn(two_ranks, (29_600 + os.getpid() % 300,), nprocs=2)
