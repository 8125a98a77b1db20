"""Training on the one loop: exact resume, several processes, and the miniature that the method must pass."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from effml_eval.sae.autoencoder import SparseAutoencoder
from effml_eval.sae.autoencoder_config import SAEConfig
from effml_eval.sae.training import DictionaryStep, EmbeddingRows, SAETrainingConfig, train_sae
from effml_shared import distributed
from effml_shared.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError
from effml_shared.loop import Hook
from effml_shared.schedules import Plan


def rows(count=300, dim=10, seed=0):
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def build(kind="batch_topk", **fields):
    return SparseAutoencoder(
        SAEConfig(**{"d_in": 10, "n_concepts": 32, "k": 3, "dead_after": 200, "kind": kind, **fields})
    )


class Stop(Hook):
    def __init__(self, step):
        self.step = step

    def on_step(self, loop, metrics):
        if loop.clock.step == self.step:
            loop._on_signal(2)


@pytest.mark.parametrize("kind", ["batch_topk", "jumprelu"])
def test_resumes_exactly(tmp_path, kind):
    config = SAETrainingConfig(steps=12, batch_size=64, lr=1e-2)
    more = {"k_start": 9, "k_steps": 8} if kind == "batch_topk" else {}
    whole = build(kind, pre_bias=True, **more)
    result = train_sae(whole, rows(), config, held_out=rows(50, seed=1))
    assert [row["step"] for row in result.history] == [*range(1, 13), 12]
    assert result.clock.samples == result.clock.tokens == 12 * 64
    assert set(result.history[-1]) == {"r2", "l0", "dead", "step"}
    assert not whole.training
    part = build(kind, pre_bias=True, **more)
    with pytest.raises(Interrupted):
        train_sae(part, rows(), config, hooks=[Stop(5)], directory=tmp_path)
    fresh = build(kind, pre_bias=True, seed=9, **more)
    again = train_sae(fresh, rows(), config, directory=tmp_path, held_out=rows(50, seed=1))
    assert again.history == result.history[5:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])


def test_the_decay_of_the_threshold_follows_the_number_of_steps():
    sae = build()
    train_sae(sae, rows(), SAETrainingConfig(steps=60, batch_size=8))
    assert sae.threshold_decay == pytest.approx(0.5)
    chosen = build(threshold_decay=0.25)
    train_sae(chosen, rows(), SAETrainingConfig(steps=2, batch_size=8))
    assert chosen.threshold_decay == 0.25


def test_a_threshold_that_lags_is_measured_at_the_end():
    """With k from 20 to 3 over the whole training, the mean of .999 is far below the last steps' thresholds."""
    config, held_out = SAETrainingConfig(steps=20, batch_size=60), rows(600, seed=5)
    ends = {}
    for decay in (0.999, None):
        sae = build(k_start=20, k_steps=20, threshold_decay=decay)
        ends[decay] = train_sae(sae, rows(1200), config, held_out=held_out).history[-1]["l0"]
        codes = sae(held_out).codes.values
        assert ends[decay] == pytest.approx(float((codes > 0).sum()) / 600)
    assert ends[0.999] == pytest.approx(3, abs=0.3)


def test_a_step_takes_tensors_and_any_optimizer():
    sae = build("topk")
    step = DictionaryStep(sae, torch.optim.SGD(sae.parameters(), lr=torch.tensor(0.1)))
    metrics = step(rows(), Plan(300, lr_factor=0.5))
    assert metrics["lr"] == pytest.approx(0.05)
    assert metrics["tokens"] == 300
    assert metrics["l0"] == pytest.approx(3, abs=0.1)
    with torch.no_grad():
        sae.atoms.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match=r"non-finite loss"):
        step(rows(), Plan(300))
    assert all(p.grad is None for p in sae.parameters())
    with pytest.raises(CheckpointError, match=r"does not fit"):
        step.load_state_dict({"model": build("topk", n_concepts=16).state_dict(), "optimizer": {}})
    with pytest.raises(ConfigError, match=r"expected a SparseAutoencoder"):
        DictionaryStep(torch.nn.Linear(2, 2), torch.optim.SGD(sae.parameters())).sae  # noqa: B018


def test_rows_from_memory_maps_are_the_same():
    x = rows()
    order = torch.tensor([3, 1, 1]).numpy()
    assert torch.equal(EmbeddingRows(x).batch(order)["x"], EmbeddingRows(x.numpy()).batch(order)["x"])
    assert EmbeddingRows(x).fingerprint != EmbeddingRows(rows(seed=2)).fingerprint


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"warmup": 1.0}, "warmup: got 1.0"),
        ({"clip_norm": 0.0}, "clip_norm: got 0.0"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        SAETrainingConfig(**fields)
    with pytest.raises(ConfigError, match=r"rows: got shape \(0, 2\)"):
        EmbeddingRows(torch.zeros(0, 2))


def paired_world(rows, seed, dim=64, concepts=96):
    """Unit embeddings of `rows` images and as many texts, whose atoms share a direction per concept."""
    world = torch.Generator().manual_seed(0)
    shift = F.normalize(torch.randn(dim, generator=world), dim=0)
    topics = F.normalize(torch.randn(concepts, dim, generator=world), dim=1)
    noise = F.normalize(torch.randn(2, concepts, dim, generator=world), dim=2)
    atoms = F.normalize(0.6**0.5 * topics + 0.4**0.5 * noise, dim=2)
    g = torch.Generator().manual_seed(seed)
    places = torch.multinomial((1 + torch.arange(concepts)).float().pow(-0.7).expand(rows, -1), 5, generator=g)
    parts = []
    for modality, sign in enumerate((0.5, -0.5)):
        weights = 0.5 + torch.rand(rows, 5, 1, generator=g)
        x = (weights * atoms[modality][places]).sum(1) + sign * shift + 0.02 * torch.randn(rows, dim, generator=g)
        parts.append(F.normalize(x, dim=1))
    return torch.cat(parts)


@pytest.mark.slow
@pytest.mark.parametrize("normalize", ["project", "graph"])
def test_miniature(normalize):
    """The joint-embedding miniature: R2 above .90 on held-out pairs at an L0 of 8, hardly any dead concepts."""
    sae = SparseAutoencoder(SAEConfig(d_in=64, n_concepts=256, k=8, normalize=normalize, dead_after=32_000))
    config = SAETrainingConfig(steps=3000, batch_size=1024, lr=1e-3)
    result = train_sae(sae, paired_world(16_000, 1), config, held_out=paired_world(4000, 2))
    final = result.history[-1]
    assert final["r2"] > 0.90
    assert final["l0"] == pytest.approx(8, abs=0.3)
    assert final["dead"] < 0.03


def worker(path):
    """Train in every process of a group; what the ranks end with must agree."""
    with distributed.launched():
        results = {kind: train_together(kind) for kind in ("batch_topk", "jumprelu")}
        for kind in ("batch_topk", "jumprelu"):
            results[f"{kind}, sharded"] = train_sharded(kind, Path(path).parent / kind)
        if distributed.is_main():
            Path(path).write_text(json.dumps(results))


def train_together(kind):
    more = {"dead_after": 60, "pre_bias": True, "sparsity_weight": 1e-2, "l0_target": 5.0, "bandwidth": 0.3}
    sae = build(kind, threshold_decay=0.999, **more).double()  # too slow for 8 steps, so the threshold is calibrated
    data = rows().double()
    data[:150] *= 3.0  # halves of a batch differ, so a threshold of each rank's own would show
    result = train_sae(sae, data, SAETrainingConfig(steps=8, batch_size=40, lr=1e-2))
    losses = [[row["loss"], row["l0"], row["grad_norm"], row["dead"]] for row in result.history]
    return {"losses": losses, "threshold": float(sae.threshold), "atoms": sae.atoms.detach().flatten()[:50].tolist()}


def train_sharded(kind, directory):
    """Train with sharded parameters, and return what one process reads of the saved model."""
    sae = build(kind, seed=4).double()
    model = distributed.parallelize(sae, "fsdp")
    step = DictionaryStep(model, torch.optim.Adam(model.parameters(), lr=1e-2), clip_norm=0.01)
    share = rows().double().tensor_split(distributed.world_size())[distributed.rank()]
    losses = [[step(share, Plan(300))[name] for name in ("loss", "l0", "grad_norm")] for _ in range(4)]
    sae.save_pretrained(directory)
    saved = SparseAutoencoder.from_pretrained(directory)
    return {"losses": losses, "threshold": float(saved.threshold), "atoms": saved.atoms.flatten()[:50].tolist()}


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path / "two.json")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads((tmp_path / "two.json").read_text())
    for kind, several in two.items():
        name, _, sharded = kind.partition(", ")
        one = train_sharded(name, tmp_path / f"one {name}") if sharded else train_together(name)
        for name, value in one.items():
            torch.testing.assert_close(torch.tensor(several[name]), torch.tensor(value), rtol=1e-6, atol=1e-8)


if __name__ == "__main__":
    worker(sys.argv[1])
