"""The bench on which experiments train language models: what it measures, remembers and refuses."""

import math

import pytest
import torch
from effml_shared.data import DataConfig
from effml_shared.errors import ConfigError
from effml_shared.loop import Hook
from effml_shared.runs import Run
from effml_shared.schedules import Plan
from effml_shared.trainings import TrainingBench, TrainingConfig, best_rates, half_width, numbers
from effml_shared.transformer import TransformerConfig


class Seen(Hook):
    steps = 0

    def on_step(self, loop, metrics):
        self.steps += 1


@pytest.fixture
def bench(tmp_path):
    config = TrainingConfig(
        model=TransformerConfig(n_layers=1, d_model=16, n_heads=2, d_ff=32),
        data=DataConfig(seq_len=16, max_bytes=2_000_000),
        batch_size=4,
        steps=3,
        eval_sequences=8,
        precision="float32",
    )
    run = Run.create(tmp_path / "run", {"experiment": "test", "preset": "smoke"}, "")
    return TrainingBench(config, run)


def train(bench, name="sgd/seed=0", lr=0.1, **more):
    return bench.train(
        name,
        lambda model: torch.optim.SGD(model.parameters(), lr=lr),
        lambda clock: Plan(lr_factor=1.0, batch_size=4),
        samples=12,
        seed=0,
        **more,
    )


def test_hooks_watch_and_measure_adds_results(bench):
    seen = Seen()
    losses = []

    def measure(model, evaluate):
        losses.append(evaluate())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.5)
        return {"halved": evaluate()}

    result = train(bench, hooks=lambda model: [seen], measure=measure)
    assert seen.steps == result["steps"] == 3
    assert losses == [result["loss"]]
    assert result["halved"] != result["loss"]
    assert result["method"] == "sgd"
    assert train(bench, measure=measure) == result  # remembered: nothing is trained or measured again
    assert len(losses) == 1


def test_equal_seeds_train_alike(bench):
    assert train(bench)["loss"] == train(bench, "again/seed=0")["loss"]


def test_a_divergence_is_an_infinite_loss_and_is_not_measured(bench):
    result = train(bench, lr=math.inf, measure=lambda model, evaluate: pytest.fail("measured"))
    assert result["loss"] == math.inf
    assert best_rates({"sgd": {0.1: 2.0, 0.2: math.inf}}) == {"sgd": 0.1}
    with pytest.raises(ConfigError, match=r"learning_rates: sgd diverged at every one"):
        best_rates({"sgd": {0.1: math.inf}})


def test_rows_of_tables():
    assert half_width([1.0]) is None
    assert half_width([1.0, math.inf]) is None
    assert half_width([1.0, 1.0, 1.0]) == 0.0
    assert math.isnan(numbers([1.0, None])[1])
