import math

import pytest
from effml_optim.experiments import seesaw
from effml_optim.experiments.seesaw import SeesawConfig, experiment
from effml_shared.config import to_yaml
from effml_shared.errors import ConfigError
from effml_shared.runs import Run
from effml_shared.schedules import Clock
from effml_shared.testing.experiments import ExperimentKit


class TestSeesawExperiment(ExperimentKit):
    experiment = experiment
    interrupt_after = 20


@pytest.fixture
def fake(monkeypatch):
    """Train nothing: final losses by schedule, serial steps from the plan."""
    losses = {"cosine": 2.0, "Seesaw": 2.005, "p=2": math.inf}

    class Bench:
        def __init__(self, config, run):
            pass

        def train(self, name, optimizer, schedule, *, samples, seed, hooks, measure):
            clock = Clock()
            while clock.samples < samples:
                clock = Clock(clock.step + 1, clock.samples + schedule(clock).batch_size)
            noise = {"noise_scale": 24.0} if name.startswith("cosine") else {}
            loss = losses[name.partition("/")[0]] + (abs(math.log10(float(name.split("lr=")[1].split("/")[0]) / 5e-3)))
            return {"loss": loss, "steps": clock.step, **noise}

    monkeypatch.setattr(seesaw, "TrainingBench", Bench)


@pytest.mark.usefixtures("fake")
def test_effects_compare_runs_of_one_seed_and_a_diverged_ramp_leaves_its_claim_open(tmp_path):
    config = experiment.configure("cpu", overrides=["steeper=[2.0]"])
    run = Run.create(tmp_path / "run", {"experiment": "optim.seesaw", "preset": "cpu"}, to_yaml(config))
    loss, steps, ramp = experiment.execute(config, run)
    assert loss.mean == pytest.approx(-0.005)
    assert (loss.verdict, steps.verdict, ramp.verdict) == ("holds", "holds", "inconclusive")
    plans = [config.plan(8, p) for p in (1.0, 0.0)]
    assert steps.mean == pytest.approx(100 * (1 - plans[0].total_steps / plans[1].total_steps))
    first, *_, last = run.summary["table"]
    assert first["learning rate"] == "0.005"
    assert (first["critical batch"], first["variance share"]) == (24.0, 0.75)
    assert (last["schedule"], last["start batch"], last["variance share"]) == ("Seesaw", 64, None)


def test_the_claimed_steps_are_what_the_plan_saves_in_the_papers_setting():
    """150M parameters, 20 tokens each, sequences of 1024, batches of 128 to 1024, quarter cosine after 10% warm-up."""
    (claim,) = (claim for claim in experiment.claims if claim.effect == "steps")
    for batch_size in (128, 256, 512, 1024):
        plan = SeesawConfig(batch_size=batch_size, steps=2_929_687 // batch_size, far_batch_size=None).plan(
            batch_size, 1
        )
        saved = 100 * (1 - plan.step_ratio)
        assert claim.at_least <= saved < claim.at_least + 0.5
        assert plan.limit_ratio == pytest.approx(1 - 0.327, abs=1e-4)
    for preset in ("cpu", "gpu"):
        config = experiment.configure(preset)
        assert 100 * (1 - config.plan(config.batch_size, 1.0).step_ratio) >= claim.at_least


def test_all_schedules_start_alike_and_the_cosine_keeps_its_batch():
    config = SeesawConfig()
    cosine, *ramps = (config.plan(8, p) for p in (0.0, 1.0, 1.5, 2.0))
    assert {row.batch_size for row in cosine.rows} == {8}
    for n in range(0, config.samples, 8):
        if n < 0.1 * config.samples:
            assert {cosine.at(n), *(ramp.at(n) for ramp in ramps)} == {cosine.at(n)}
    assert cosine.at(1232).lr_factor == pytest.approx(math.cos(math.pi / 2 * (1232 - 224) / (2240 - 224)))
    assert [ramp.total_steps for ramp in ramps] == sorted((ramp.total_steps for ramp in ramps), reverse=True)


@pytest.mark.parametrize(
    "field",
    [
        {"steps": 0},
        {"micro_batch": 0},
        {"learning_rates": []},
        {"clip_norm": 0.0},
        {"warmup": 1.0},
        {"precision": "fp8"},
        {"kind": "whole"},
        {"alpha": 1.0},
        {"unit": 0},
        {"steeper": [1.5]},
        {"steeper": [1.0, 2.0]},
        {"far_batch_size": 8},
    ],
)
def test_wrong_fields_are_named(field):
    with pytest.raises(ConfigError, match=f"^{next(iter(field))}: got"):
        SeesawConfig(**field)


def test_a_batch_that_the_unit_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match="batch_size: got 8, expected a multiple of unit"):
        SeesawConfig(unit=3)


def test_a_cosine_that_always_diverges_ends_the_run(tmp_path):
    hopeless = experiment.configure("smoke", overrides=["learning_rates=[1e30]", "clip_norm=1e30"])
    run = Run.create(tmp_path / "run", {"experiment": "optim.seesaw", "preset": "smoke"}, to_yaml(hopeless))
    with pytest.raises(ConfigError, match="learning_rates: cosine at batch 4, cosine at batch 8 diverged"):
        experiment.execute(hopeless, run)
