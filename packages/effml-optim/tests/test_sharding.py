"""Sharded parameters on 2 and 3 gloo ranks: the weights of one process, wherever state was begun and is continued."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from effml_optim import SOAP, Muon, Shampoo, split_params
from effml_optim.matrix.sharding import Owners, Shards, shards_of
from effml_shared import distributed
from effml_shared.checkpoint import Checkpoints
from effml_shared.data import ByteTokenizer, Loader, PackedDataset
from effml_shared.errors import ConfigError, NonFiniteError
from effml_shared.loop import Budget, Loop
from effml_shared.schedules import cosine
from effml_shared.steps import GradientStep, language_model_loss
from effml_shared.transformer import Transformer, TransformerConfig
from torch.nn import Parameter

# Uneven, tiny (fewer rows than ranks), long and short, of three axes; the last one is left to AdamW.
SHAPES = [(5, 4), (1, 3), (7, 7), (9, 2), (2, 8), (3, 3, 2), (4,), (2, 5)]
OPTIMIZERS = {
    "SOAP": lambda groups: SOAP(groups, lr=0.1, weight_decay=0.1, precondition_frequency=2),
    "lean": lambda groups: SOAP.lean(groups, lr=0.1, precondition_frequency=2, stagger=True),
    "Shampoo": lambda groups: Shampoo(groups, lr=0.1, weight_decay=0.1, precondition_frequency=2),
    "Muon": lambda groups: Muon(groups, lr=0.1, weight_decay=0.1),
}
STEPS, HALF = 7, 3


def tensors(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


class Training:
    """Parameters placed by `place`, an optimizer, and gradients that depend on the step alone."""

    def __init__(self, name, place=lambda tensor: tensor, dtype=torch.float64):
        self.place, self.dtype, self.name = place, dtype, name
        self.params = [Parameter(place(tensor)) for tensor in tensors(99, dtype)]
        matrices, rest = self.params[:6], self.params[6:]
        self.optimizer = OPTIMIZERS[name]([{"params": matrices}, {"params": rest, "use_adamw": True}])

    def run(self, start, stop):
        for step in range(start, stop):
            for number, (param, grad) in enumerate(zip(self.params, tensors(step, self.dtype), strict=True)):
                param.grad = None if (step, number) == (1, 3) else self.place(grad)  # one comes late, one pauses
            if step == 0:
                self.params[0].grad = None
            self.optimizer.step()
        return self

    def state_dict(self):
        return {"params": dict(enumerate(p.detach() for p in self.params)), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        with torch.no_grad():
            for number, value in state["params"].items():
                self.params[int(number)].copy_(distributed.shard_like(value, self.params[int(number)]))
        self.optimizer.load_state_dict(state["optimizer"])

    def assert_equals(self, other, atol=1e-12):
        for mine, theirs in zip(self.params, other.params, strict=True):
            whole = mine.full_tensor() if distributed.is_sharded(mine) else mine
            torch.testing.assert_close(whole, theirs, rtol=0, atol=atol)


def language_model(directory, samples):
    config = TransformerConfig(n_layers=1, d_model=12, n_heads=2, d_ff=20, vocab_size=258)
    model = distributed.parallelize(Transformer(config).double(), "fsdp")
    optimizer = SOAP(split_params(model), lr=0.01, precondition_frequency=2)
    step = GradientStep(model, optimizer, language_model_loss, micro_batch=2, clip_norm=1.0)
    text = [f"{i} plus {i} is {2 * i}. " * 4 for i in range(40)]
    rank, world = distributed.rank(), distributed.world_size()
    data = Loader(PackedDataset(text, ByteTokenizer(), 16), rank=rank, world_size=world)
    checkpoints = Checkpoints(directory, mesh=distributed.mesh_of(model))
    Loop(step, data, cosine(5, 40), budget=Budget(samples=samples), checkpoints=checkpoints).run()
    whole = [p.full_tensor() if distributed.is_sharded(p) else p for p in model.parameters()]
    return [p.detach().flatten().tolist() for p in whole]


def check_placements(mesh, world):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    two = init_device_mesh("cpu", (1, world), mesh_dim_names=("replicate", "shard"))
    for on, placements in ((mesh, [Shard(0)]), (mesh, [Shard(1)]), (two, [Replicate(), Shard(0)])):

        def place(tensor, on=on, placements=placements):
            fits = placements if tensor.ndim > 1 else [Replicate()] * on.ndim
            return distribute_tensor(tensor, on, fits)

        Training("SOAP", place).run(0, STEPS).assert_equals(Training("SOAP").run(0, STEPS))
    with pytest.raises(ConfigError, match="expected one Shard and otherwise Replicate"):
        Training("SOAP", lambda t: distribute_tensor(t, two, [Shard(0), Shard(t.ndim - 1)])).run(1, 2)


def check_ownership(place, world):
    training = Training("SOAP", place).run(0, STEPS)
    states = [training.optimizer.state[param] for param in training.params[:6]]
    (owned,) = distributed.reduce_sum(sum("exp_avg" in state for state in states))
    assert owned == 6
    (busiest,) = distributed.reduce_max(sum("exp_avg" in state for state in states))
    assert busiest < 6
    assert all(state["step"] == STEPS - 1 for state in states[1:3])  # every rank counts; the first call sets up
    assert states[0]["step"] == STEPS - 2
    names = [f"param_groups[0]['params'][{number}]" for number in range(6)]
    assert sorted(training.optimizer.basis_staleness()) == names
    training.optimizer.refresh_now()


def check_bfloat16(place):
    trainings = [Training("SOAP", p, torch.bfloat16) for p in (place, lambda tensor: tensor)]
    for training in trainings:
        for group in training.optimizer.param_groups:
            group["weight_decay"] = 0.0  # then both round a weight once per step
        training.run(0, STEPS)
    trainings[0].assert_equals(trainings[1], atol=0)
    assert all(v.dtype == torch.float32 for s in trainings[0].optimizer.state.values() for v in s.values())


def check_failure(place):
    training = Training("SOAP", place).run(0, 4)  # the next call refreshes, and looks at the factors
    before = [param.full_tensor().clone() for param in training.params[:6]]
    for param, grad in zip(training.params, tensors(0), strict=True):
        param.grad = place(grad)
    training.params[2].grad = place(tensors(0)[2].fill_(torch.inf))
    with pytest.raises(NonFiniteError, match=r"not finite|another rank"):
        training.optimizer.step()
    assert all(torch.equal(a, b.full_tensor()) for a, b in zip(before, training.params[:6], strict=True))


def check_dcp(mesh):
    """The state of torch's own checkpointing tools, in and out."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
    from torch.distributed.fsdp import fully_shard

    def build():
        torch.manual_seed(0)
        model = fully_shard(torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3)).double(), mesh=mesh)
        return model, SOAP(split_params(model), lr=0.1, precondition_frequency=2)

    def train(model, optimizer, start, stop):
        for step in range(start, stop):
            torch.manual_seed(step)
            model(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = build()
    train(model, optimizer, 0, 5)
    saved = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    other, continued = build()
    other.load_state_dict(saved["model"])
    set_optimizer_state_dict(other, continued, saved["optimizer"])
    train(model, optimizer, 5, 9)
    train(other, continued, 5, 9)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a.full_tensor(), b.full_tensor()) for a, b in pairs)


def worker():
    root, job = Path(sys.argv[1]), sys.argv[2]
    with distributed.launched():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        world = distributed.world_size()
        mesh = init_device_mesh("cpu", (world,))

        def place(tensor):
            return distribute_tensor(tensor, mesh, [Shard(0)])

        for name in OPTIMIZERS:
            training, checkpoints = Training(name, place), Checkpoints(root / name, mesh=mesh)
            if job == "begin":
                Training(name, place).run(0, STEPS).assert_equals(Training(name).run(0, STEPS))
                checkpoints.save(HALF, training.run(0, HALF).state_dict())
            else:
                training.load_state_dict(checkpoints.load().state)
                training.run(HALF, STEPS).assert_equals(Training(name).run(0, STEPS))
        check_bfloat16(place)
        check_ownership(place, world)
        check_failure(place)
        if job == "begin":
            check_placements(mesh, world)
            check_dcp(mesh)
        trained = language_model(root / "model", 20 if job == "begin" else 40)
        if distributed.is_main():
            (root / f"{job}.json").write_text(json.dumps(trained))


def launch(processes, root, job):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, str(root), job], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((root / f"{job}.json").read_text())


def test_two_ranks_one_and_three_give_the_same_weights(tmp_path):
    begun = launch(2, tmp_path, "begin")
    alone = language_model(tmp_path / "alone", 20)
    for ours, theirs in zip(begun, alone, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)
    for name in OPTIMIZERS:  # one process goes on with what two began
        training = Training(name)
        training.load_state_dict(Checkpoints(tmp_path / name).load().state)
        training.run(HALF, STEPS).assert_equals(Training(name).run(0, STEPS))
    whole = language_model(tmp_path / "whole", 40)
    for ours, theirs in zip(launch(3, tmp_path, "continue"), whole, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)


class Ranks:
    """What `Shards` asks of a device mesh."""

    def __init__(self, size):
        self.count = size

    def size(self, _):
        return self.count


@pytest.mark.parametrize(
    ("n", "world", "expected"), [(5, 2, [3, 2]), (4, 3, [2, 2, 0]), (1, 3, [1, 0, 0]), (0, 2, [0, 0])]
)
def test_rows_are_cut_as_torch_chunks_them(n, world, expected):
    shards = Shards(Ranks(world), 0, 0)
    assert [shards.shape((n, 7), rank) for rank in range(world)] == [(rows, 7) for rows in expected]
    ends = [sum(shards.extent(n, rank)) for rank in range(world)]
    assert ends[-1] == n


def test_owners_share_the_work_and_keep_what_they_have():
    shards, owners = Shards(Ranks(2), 0, 0), Owners()
    params = [Parameter(torch.zeros(1)) for _ in range(6)]
    owners.assign([(param, shards, cost) for param, cost in zip(params, (1, 2, 3, 9, 3, 0), strict=True)])
    assert [owners.of(param) for param in params[:5]] == [1, 1, 1, 0, 1]
    late = Parameter(torch.zeros(1))
    owners.assign([(param, shards, 100.0) for param in [*params, late]])
    assert owners.of(late) in (0, 1)
    assert [owners.of(param) for param in params[:5]] == [1, 1, 1, 0, 1]
    assert shards_of(late) is None


if __name__ == "__main__":
    worker()
