"""Two processes, DDP and FSDP2: the gradients of the naive loop in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from effml_arch.recurrent import RecurrentTransformer, RecurrentTransformerConfig
from torch import Tensor, nn

ROWS, RANKS = 4, 2
FROZEN = "model.layers.0.self_attn.k_proj.weight"


def model(backend: str) -> RecurrentTransformer:
    config = RecurrentTransformerConfig(
        n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=50, qk_norm="head", base_block=4
    )
    made = RecurrentTransformer(config, seed=3).double()
    for layer in made.model["layers"]:  # type: ignore[attr-defined]
        layer.backend = backend
    made.get_parameter(FROZEN).requires_grad_(False)
    return made


def loss(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    ids = torch.randint(50, (ROWS, 13), generator=torch.Generator().manual_seed(0))[rows]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return model(ids, attention_mask=mask, labels=ids).loss_sum


def gradients(parallel: nn.Module, rank: int, names: list[str]) -> dict[str, Tensor | None]:
    """Train on this rank's rows; return the gradients by name, where they are."""
    size = ROWS // RANKS
    rows = slice(rank * size, (rank + 1) * size)
    loss(parallel, rows).backward()
    module: Any = parallel.module if hasattr(parallel, "module") else parallel
    found = {name: module.get_parameter(name).grad for name in names}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def expected() -> dict[str, Tensor | None]:
    """Return what ranks average: the gradients of the sum over all rows, divided by the number of ranks."""
    whole, size = model("naive"), ROWS // RANKS
    for rank in range(RANKS):  # the mask of `loss` is that of a rank's first row
        (loss(whole, slice(rank * size, (rank + 1) * size)) / RANKS).backward()
    return {name: parameter.grad for name, parameter in whole.named_parameters()}


def work(rank: int, meeting: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=meeting.as_uri(), rank=rank, world_size=RANKS)
    exact = expected()
    replicated = nn.parallel.DistributedDataParallel(model("tiled"))
    sharded, mesh = model("tiled"), init_device_mesh("cpu", (RANKS,))
    for layer in sharded.model["layers"]:  # type: ignore[attr-defined]
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for parallel in (replicated, sharded):
        for name, got in gradients(parallel, rank, list(exact)).items():
            want = exact[name]
            assert (got is None) == (want is None) == (name == FROZEN), name
            if got is not None and want is not None:
                assert (got - want).norm() <= 1e-11 * want.norm(), (type(parallel).__name__, name)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_ranks_have_the_gradients_of_one_process(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = [[sys.executable, __file__, str(tmp_path / "meeting"), str(rank)] for rank in range(RANKS)]
    ranks = [subprocess.Popen(c, env=environment, stderr=subprocess.PIPE, text=True) for c in commands]
    try:
        errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * RANKS, "\n".join(errors)[-4000:]


def test_gradients_of_single_tensors_leave_grad_alone_and_equal_naive() -> None:
    found = []
    for backend in ("naive", "tiled"):
        one = model(backend)
        names = ["model.layers.0.self_attn.v_proj.weight", "model.layers.1.mlp.up_proj.weight"]
        found.append(torch.autograd.grad(loss(one), [one.get_parameter(name) for name in names]))
        assert all(parameter.grad is None for parameter in one.parameters())
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-11 * want.norm()


if __name__ == "__main__":
    work(int(sys.argv[2]), Path(sys.argv[1]))
