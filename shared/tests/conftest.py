"""A toy experiment for the floors above the loop: it trains in milliseconds and claims something decidable."""

from dataclasses import dataclass

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
