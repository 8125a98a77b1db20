"""SOAP and Muon train a masked diffusion model sharded over two processes, as in one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from effml_diffusion import (
    Corruption,
    DiffusionBlock,
    DiffusionTransformer,
    DiffusionTransformerConfig,
    MaskedDiffusion,
)
from effml_optim import SOAP, Muon, split_params
from effml_shared import distributed
from effml_shared.loop import Budget, Hook, Loop
from effml_shared.schedules import cosine
from effml_shared.seeding import generator
from effml_shared.steps import GradientStep

OPTIMIZERS = {"SOAP": SOAP, "Muon": Muon}
MASK, LENGTH, BATCH, STEPS = 8, 12, 6, 24


class Corrupted:
    """Sequences of one token each, corrupted for the whole batch at once, so that masks do not depend on the ranks."""

    def __init__(self, objective, start=0):
        self.objective, self.position = objective, start

    def next(self, batch_size):
        random = generator(0, "data", self.position)
        ids = torch.randint(MASK, (batch_size, 1), generator=random).repeat(1, LENGTH)
        times = torch.rand(batch_size, generator=random).clamp(min=0.1)  # not the ones that differ from rank to rank
        corruption = self.objective.corrupt(ids, t=times, generator=random)
        self.position += batch_size
        rank, world = distributed.rank(), distributed.world_size()
        mine = slice(batch_size * rank // world, batch_size * (rank + 1) // world)
        return {"x": ids[mine], **{name: field[mine] for name, field in corruption._asdict().items()}}

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class History(Hook):
    def __init__(self):
        self.losses = []

    def on_step(self, loop, metrics):
        self.losses.append(metrics["loss"])


def train(name):
    """Return the loss of one corruption before and after training, losses of all steps, and the weights at the end."""
    config = DiffusionTransformerConfig(n_layers=2, d_model=18, n_heads=3, d_ff=20, vocab_size=MASK + 1)
    model = distributed.parallelize(DiffusionTransformer(config).double(), "fsdp", blocks=DiffusionBlock)
    objective = MaskedDiffusion(model, mask_id=MASK)

    def loss(model, batch):
        x = batch["x"]
        corruption = Corruption(**{name: value for name, value in batch.items() if name != "x"})
        return objective.per_token(x, corruption, model=model).sum(), corruption.maskable.sum()

    optimizer = OPTIMIZERS[name](split_params(model), lr=0.02)
    step, history, data = GradientStep(model, optimizer, loss, micro_batch=2), History(), Corrupted(objective)
    held_out = [Corrupted(objective, start=1_000_000).next(64)]
    total = STEPS * BATCH
    before = step.evaluate(held_out)
    Loop(step, data, cosine(BATCH, total), budget=Budget(samples=total), hooks=[history]).run()
    whole = [p.detach().full_tensor() if distributed.is_sharded(p) else p.detach() for p in model.parameters()]
    return {
        "held out": [before["loss"], step.evaluate(held_out)["loss"]],
        "losses": history.losses,
        "weights": [weight.flatten().tolist() for weight in whole],
    }


def worker():
    """Entry point under torchrun: the file that results go to."""
    with distributed.launched():
        results = {name: train(name) for name in OPTIMIZERS}
        if distributed.is_main():
            Path(sys.argv[1]).write_text(json.dumps(results))


@pytest.mark.slow
def test_two_ranks_train_the_weights_of_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    file = tmp_path / "results.json"
    done = subprocess.run([*command, __file__, str(file)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    both = json.loads(file.read_text())
    for name in OPTIMIZERS:
        alone = train(name)
        before, after = alone["held out"]
        assert after < 0.8 * before, name
        for measured in ("held out", "losses"):
            assert both[name][measured] == pytest.approx(alone[measured], abs=1e-9), name
        for ours, theirs in zip(both[name]["weights"], alone["weights"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-7), name


if __name__ == "__main__":
    worker()
