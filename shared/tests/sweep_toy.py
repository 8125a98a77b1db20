"""An experiment that other processes can find: tests install this file as a package, and sweep over its fields."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from effml_shared.experiments import Claim, Experiment
from effml_shared.loop import Budget, Loop
from effml_shared.schedules import cosine
from effml_shared.steps import GradientStep


@dataclass
class Toy:
    lr: float = 0.1
    steps: int = 4
    seeds: list[int] = field(default_factory=lambda: [0, 1])
    pause: float = 0.0  # seconds per step
    needs: str = ""  # a file without which it fails


class Ones:
    def __init__(self, pause: float) -> None:
        self.pause, self.position = pause, 0

    def next(self, batch_size: int) -> torch.Tensor:
        time.sleep(self.pause)
        self.position += batch_size
        return torch.ones(batch_size, 2)

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


def run(config, run):
    if config.needs and not Path(config.needs).exists():
        raise ZeroDivisionError("asked\nto fail")

    def train(seed, trial):
        torch.manual_seed(seed)
        model = torch.nn.Linear(2, 1)
        loss = lambda m, x: (m(x).square().sum(), torch.tensor(len(x)))  # noqa: E731
        step = GradientStep(model, torch.optim.SGD(model.parameters(), lr=config.lr), loss)
        samples = 4 * config.steps
        loop = Loop(
            step,
            Ones(config.pause),
            cosine(4, samples),
            budget=Budget(samples=samples),
            hooks=trial.hooks,
            checkpoints=trial.checkpoints,
        )
        loop.run()
        return {"weight": model.weight[0, 0].item()}

    weights = [run.trial(f"SGD/seed={s}", lambda trial, s=s: train(s, trial))["weight"] for s in config.seeds]
    return {"effects": {"weight": weights}, "table": [{"method": "SGD", "weight": weights[0]}]}


experiment = Experiment(
    name="toy.installed",
    title="a weight stays small",
    paper="nobody, arXiv 0000.00000",
    presets={"smoke": Toy, "cpu": Toy},
    minutes={"smoke": "1 s", "cpu": "1 s"},
    run=run,
    claims=(Claim("weight", "the weight ends above -2", "above -2", " units", at_least=-2.0),),
)
