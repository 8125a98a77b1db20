"""A toy experiment for the floors above the loop: it trains in milliseconds and claims something decidable."""

import os
import resource
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from effml_shared.errors import ConfigError
from effml_shared.experiments import Claim, Experiment
from effml_shared.loop import Budget, Loop
from effml_shared.schedules import cosine
from effml_shared.steps import GradientStep


@dataclass
class Toy:
    width: int = 4  # inputs of the linear model
    steps: int = 12
    seeds: int = 3
    lr: float = 0.1

    def __post_init__(self):
        for name in ("width", "steps", "seeds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected an integer >= 1")


class Noise:
    def __init__(self, width):
        self.width, self.position = width, 0

    def next(self, batch_size):
        generator = torch.Generator().manual_seed(self.position)
        self.position += batch_size
        return torch.randn(batch_size, self.width, generator=generator)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def train(config, name, optimizer, seed, run):
    def body(trial):
        torch.manual_seed(seed)
        model = torch.nn.Linear(config.width, 1)

        def loss(m, x):
            return ((m(x).squeeze(-1) - x.sum(1)) ** 2).sum(), torch.tensor(len(x))

        step = GradientStep(model, optimizer(model.parameters(), lr=config.lr), loss)
        samples = 8 * config.steps
        loop = Loop(
            step,
            Noise(config.width),
            cosine(8, samples),
            budget=Budget(samples=samples),
            hooks=trial.hooks,
            evaluate=lambda: step.evaluate([Noise(config.width).next(64)]),
            checkpoints=trial.checkpoints,
        )
        clock = loop.run()
        return {"loss": loop.evaluation["loss"], "samples": clock.samples}

    return run.trial(f"{name}/seed={seed}", body)


def run_toy(config, run):
    run.expect(2 * config.seeds * 8 * config.steps)
    sgd = [train(config, "SGD", torch.optim.SGD, s, run)["loss"] for s in range(config.seeds)]
    adam = [train(config, "Adam", torch.optim.Adam, s, run)["loss"] for s in range(config.seeds)]
    return {
        "effects": {"gap": [a - s for a, s in zip(adam, sgd, strict=True)]},
        "table": [{"method": "SGD", "loss": sgd[0]}, {"method": "Adam <b>", "loss": adam[0]}],
    }


@pytest.fixture
def toy():
    return Experiment(
        name="toy.linear",
        title="SGD beats Adam on a <linear> model",
        paper="nobody, arXiv 0000.00000",
        presets={"smoke": lambda: Toy(steps=6, seeds=2), "cpu": Toy, "gpu": Toy},
        minutes={"smoke": "1 s", "cpu": "1 s", "gpu": "1 s"},
        run=run_toy,
        claims=(Claim("gap", "Adam ends above SGD", "above 0", " nats", at_least=0.0),),
    )


@pytest.fixture
def announced(toy, monkeypatch):
    """Announce the toy as if an installed package did."""

    class Entry:
        name = toy.name

        def load(self):
            return toy

    monkeypatch.setattr("effml_shared.experiments.discover", lambda: {toy.name: Entry()})
    return toy


@pytest.fixture
def full_disk():
    """Return a context in which no file grows beyond so many bytes: writes stop in the middle, as on a full disk."""

    @contextmanager
    def limit(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limit


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install `sweep_toy.py` where processes that a test starts find it: experiment `toy.installed`."""
    site = tmp_path / "site"
    about = site / "effml_toy-1.0.dist-info"
    about.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("sweep_toy.py"), site / "effml_toy.py")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: effml-toy\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[effml.experiments]\ntoy.installed = effml_toy:experiment\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(site)
    return site
