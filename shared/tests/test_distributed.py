"""Several processes against one: the same losses, and checkpoints that any world size continues."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from effml_shared import distributed
from effml_shared.checkpoint import Checkpoints
from effml_shared.data import ByteTokenizer, Loader, PackedDataset
from effml_shared.errors import ConfigError
from effml_shared.layers import Block
from effml_shared.loop import Budget, Hook, Loop
from effml_shared.schedules import Plan
from effml_shared.steps import GradientStep, language_model_loss
from effml_shared.transformer import Transformer, TransformerConfig

SIZES = [5, 1, 8, 6, 7, 3, 1, 8]  # uneven, and at times fewer rows than processes
HALF = sum(SIZES[:4])


class Losses(Hook):
    def __init__(self):
        self.rows = []

    def on_step(self, loop, metrics):
        self.rows.append([metrics["loss"], metrics["grad_norm"], metrics["tokens"]])


def schedule(clock):
    return Plan(SIZES[clock.step % len(SIZES)], lr_factor=1 / (1 + clock.step))


def train(strategy, directory, budget):
    """Train a small Transformer; runs in every process. Returns losses and held-out loss."""
    config = TransformerConfig(n_layers=2, d_model=24, n_heads=2, d_ff=40, vocab_size=258, tied=True)
    model = distributed.parallelize(Transformer(config, seed=1), strategy, blocks=Block)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    step = GradientStep(model, optimizer, language_model_loss, micro_batch=2, clip_norm=0.7)
    text = [f"{i} times {i} is {i * i}. " * 3 for i in range(60)]
    data = PackedDataset(text, ByteTokenizer(), 17)
    rank, world = distributed.rank(), distributed.world_size()
    losses = Losses()
    loop = Loop(
        step,
        Loader(data, rank=rank, world_size=world),
        schedule,
        budget=Budget(samples=budget),
        hooks=[losses],
        evaluate=lambda: step.evaluate([data.batch(torch.arange(rank, 31, world).numpy())]),
        checkpoints=Checkpoints(directory, mesh=distributed.mesh_of(model)),
    )
    loop.run()
    return {"losses": losses.rows, "held_out": loop.evaluation["loss"]}


def worker():
    """Entry point under torchrun: a directory, a sample budget, strategies; results go beside the checkpoints."""
    root, budget, *strategies = sys.argv[1:]
    with distributed.launched():
        results = {strategy: train(strategy, Path(root) / strategy, int(budget)) for strategy in strategies}
        if distributed.is_main():
            (Path(root) / "results.json").write_text(json.dumps(results))


def launch(processes, root, budget, *strategies):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [__file__, str(root), str(budget), *strategies]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "results.json").read_text())


def assert_same(a, b):
    torch.testing.assert_close(torch.tensor(a["losses"]), torch.tensor(b["losses"]), rtol=0, atol=1e-5)
    assert a["held_out"] == pytest.approx(b["held_out"], abs=1e-5)


def test_any_number_of_processes_trains_and_resumes_like_one(tmp_path):
    alone = train("ddp", tmp_path / "alone", sum(SIZES))
    begun, rest = ({**alone, "losses": alone["losses"][part]} for part in (slice(0, 4), slice(4, 8)))
    several = tmp_path / "several"
    several.mkdir()
    for results in launch(2, several, HALF, "ddp", "fsdp").values():
        assert_same(begun, {**results, "held_out": alone["held_out"]})
    assert not (several / "ddp" / "step-00000004" / "shards").exists()
    assert (several / "fsdp" / "step-00000004" / "shards").exists()
    shutil.copytree(several, tmp_path / "one")
    for strategy in ("ddp", "fsdp"):  # a single process continues what two began, and so do three
        assert_same(rest, train(strategy, tmp_path / "one" / strategy, sum(SIZES)))
    assert_same(rest, launch(3, several, sum(SIZES), "fsdp")["fsdp"])


def test_in_one_process_every_collective_is_the_identity():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.reduce_sum(1.5, 2.0) == [1.5, 2.0]
    assert distributed.reduce_max(1.5) == [1.5]
    assert distributed.from_main(3) == 3
    model = torch.nn.Linear(2, 2)
    assert distributed.parallelize(model, "fsdp") is model
    assert distributed.mesh_of(model) is None
    with pytest.raises(ConfigError, match="strategy: got 'zero'"):
        distributed.parallelize(model, "zero")
    with pytest.raises(KeyError), distributed.agreed("testing"):
        raise KeyError


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_shards_that_cannot_be_written_are_an_ordinary_error(tmp_path, full_disk):
    with full_disk(10_000), pytest.raises(OSError, match="File too large"):
        distributed.save_sharded({"w": torch.zeros(10_000)}, tmp_path / "shards")


if __name__ == "__main__":
    worker()
