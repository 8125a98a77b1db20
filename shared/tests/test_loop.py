import math
import os
import random
import signal
import time

import pytest
import torch
from effml_shared import seeding
from effml_shared.checkpoint import Checkpoints
from effml_shared.errors import ConfigError, Interrupted, NonFiniteError
from effml_shared.loop import Budget, Hook, Loop
from effml_shared.runs import Run
from effml_shared.schedules import Plan, cosine
from effml_shared.steps import GradientStep
from torch import nn


class Points:
    """An endless regression stream, indexed by samples consumed."""

    def __init__(self):
        self.position = 0

    def next(self, batch_size):
        rows = [torch.randn(4, generator=seeding.generator(0, self.position + i)) for i in range(batch_size)]
        self.position += batch_size
        return torch.stack(rows)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def loss(model, x):
    return ((model(x).squeeze(-1) - x.sum(1)) ** 2).sum(), torch.tensor(len(x))


def make_step():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 64), nn.Dropout(0.2), nn.Tanh(), nn.Linear(64, 1)
    )  # dropout: random state counts
    return GradientStep(model, torch.optim.AdamW(model.parameters(), lr=0.01), loss, micro_batch=3)


def growing(clock):
    return Plan(2 + clock.samples // 40, lr_factor=1 / (1 + clock.samples / 100))


def make_loop(**options):
    options = {"budget": Budget(samples=200), "schedule": growing, **options}
    schedule = options.pop("schedule")
    step = options.pop("step", None) or make_step()
    return Loop(step, Points(), schedule, **options)


class Log(Hook):
    def __init__(self):
        self.rows, self.evaluations, self.ended = [], [], 0

    def on_step(self, loop, metrics):
        self.rows.append((loop.clock.step, loop.clock.samples, dict(metrics)))

    def on_evaluate(self, loop, metrics):
        self.evaluations.append((loop.clock.samples, dict(metrics)))

    def on_end(self, loop):
        self.ended += 1


def test_the_plan_is_obeyed_and_the_last_step_is_cut_to_the_budget():
    log = Log()
    loop = make_loop(hooks=[log])
    clock = loop.run()
    assert (clock.samples, loop.data.position) == (200, 200)
    consumed = 0
    for _, samples, metrics in log.rows:
        plan = growing(type(clock)(samples=consumed))
        assert samples - consumed == min(plan.batch_size, 200 - consumed)
        assert metrics["lr"] == pytest.approx(0.01 * plan.lr_factor)
        consumed = samples
    assert clock.tokens == 200
    assert clock.seconds > 0
    assert log.ended == 1


@pytest.mark.parametrize(("limit", "value"), [("steps", 7), ("samples", 33), ("tokens", 20)])
def test_each_budget_stops(limit, value):
    clock = make_loop(budget=Budget(**{limit: value, "seconds": 1000.0})).run()
    assert value <= getattr(clock, limit.removesuffix("s") if limit == "steps" else limit) <= value + 2


def test_the_seconds_budget_counts_training_only():
    slow = lambda: time.sleep(0.2) or {"loss": 0.0}  # noqa: E731
    clock = make_loop(
        budget=Budget(seconds=0.1), schedule=lambda clock: Plan(1), evaluate=slow, evaluate_every=10
    ).run()
    assert 0.1 <= clock.seconds < 0.2


def test_evaluation_happens_when_the_sample_clock_crosses_and_at_the_end():
    log = Log()
    loop = make_loop(hooks=[log], evaluate=lambda: {"loss": 1.0}, evaluate_every=50, schedule=cosine(7, 200))
    loop.run()
    assert [samples for samples, _ in log.evaluations] == [56, 105, 154, 200]
    assert loop.evaluation == {"loss": 1.0, "step": 29}


def untimed(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def train_trial(run, save_every=0.0, watch=()):
    """One trial, saved after every step, with evaluation, through the machinery that experiments use."""

    def train(trial):
        step = make_step()
        points = Points().next(16)
        loop = Loop(
            step,
            Points(),
            growing,
            budget=Budget(samples=150),
            hooks=[*trial.hooks, *watch],
            evaluate=lambda: step.evaluate([points]),
            evaluate_every=30,
            checkpoints=trial.checkpoints,
            save_every=save_every,
        )
        loop.run()
        return {"weights": [p.tolist() for p in step.model.parameters()], **loop.evaluation}

    return run.trial("plain/seed=0", train)


def new_run(path):
    return Run.create(path, {"experiment": "none", "preset": "none"}, "{}")


def test_killed_at_thirty_random_moments_it_ends_the_same(tmp_path):
    """SIGKILL at 30 random moments of a run that saves at every step; each time, continue to the end and compare."""
    torch.set_num_threads(1)  # the children are forks, and OpenMP threads do not survive one
    whole = new_run(tmp_path / "whole")
    result = train_trial(whole)
    steps = max(row["step"] for row in whole.metrics())
    generator = random.Random(0)
    inside_a_save = 0
    for index in range(30):
        run = new_run(tmp_path / str(index))
        child = os.fork()
        if child == 0:
            train_trial(run)
            os._exit(0)
        step = generator.randrange(steps - 3)
        while len(run.metrics()) <= step:
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.02))  # about one step with its save
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
        leftovers = [*run.path.glob("checkpoints/*/.partial-*"), *run.path.glob("checkpoints/*/.stale-*")]
        inside_a_save += bool(leftovers)
        resumed = Run(run.path)
        assert train_trial(resumed) == result
        assert untimed(resumed.metrics()) == untimed(whole.metrics())
    assert inside_a_save >= 3


class InterruptAt(Hook):
    def __init__(self, step, signum):
        self.step, self.signum = step, signum

    def on_step(self, loop, metrics):
        if loop.clock.step == self.step:
            os.kill(os.getpid(), self.signum)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_the_rest_is_the_same(tmp_path, signum):
    before = signal.getsignal(signum)
    whole, broken = new_run(tmp_path / "whole"), new_run(tmp_path / "broken")
    result = train_trial(whole, save_every=1e9)
    with pytest.raises(Interrupted, match=r"after step 9; saved at .*step-00000009") as caught:
        train_trial(broken, save_every=1e9, watch=[InterruptAt(9, signum)])
    assert caught.value.signum == signum
    assert signal.getsignal(signum) is before
    resumed = Run(broken.path)
    assert train_trial(resumed, save_every=1e9) == result
    assert untimed(resumed.metrics()) == untimed(whole.metrics())


def test_a_signal_without_checkpoints_says_that_nothing_is_saved():
    with pytest.raises(Interrupted, match="nothing is saved"):
        make_loop(hooks=[InterruptAt(2, signal.SIGINT)]).run()


def test_a_non_finite_step_names_step_parameter_and_last_good_checkpoint(tmp_path):
    class Poison(Hook):
        def on_step(self, loop, metrics):
            if loop.clock.step == 5:
                with torch.no_grad():
                    next(iter(loop.step.model.parameters()))[0] = math.nan

    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(NonFiniteError, match=r"step 6: non-finite gradient of 0\.weight .*step-00000004"):
        make_loop(hooks=[Poison(), SaveAt(4)], checkpoints=checkpoints, save_every=1e9).run()
    with pytest.raises(NonFiniteError, match="no checkpoint was saved yet"):
        make_loop(hooks=[Poison()]).run()


class SaveAt(Hook):
    def __init__(self, step):
        self.step = step

    def on_step(self, loop, metrics):
        if loop.clock.step == self.step:
            loop.save()


def test_hooks_with_state_travel_in_the_checkpoint(tmp_path):
    class Count(Hook):
        def __init__(self):
            self.seen = 0

        def on_step(self, loop, metrics):
            self.seen += 1

        def state_dict(self):
            return {"seen": self.seen}

        def load_state_dict(self, state):
            self.seen = state["seen"]

    with pytest.raises(Interrupted):
        make_loop(hooks=[Count(), InterruptAt(4, signal.SIGINT)], checkpoints=Checkpoints(tmp_path)).run()
    count = Count()
    clock = make_loop(hooks=[count], checkpoints=Checkpoints(tmp_path)).run()
    assert count.seen == clock.step


def test_a_finished_run_loads_and_trains_no_further(tmp_path):
    first = make_loop(checkpoints=Checkpoints(tmp_path), evaluate=lambda: {"loss": 2.0})
    first.run()
    again = make_loop(checkpoints=Checkpoints(tmp_path), evaluate=lambda: pytest.fail("evaluated twice"))
    assert again.run() == first.clock
    assert again.evaluation == first.evaluation


def test_bad_limits_are_named():
    with pytest.raises(ConfigError, match="no limit"):
        Budget()
    with pytest.raises(ConfigError, match=r"budget\.steps"):
        Budget(steps=0)
    with pytest.raises(ConfigError, match="evaluate_every"):
        make_loop(evaluate_every=0)
    with pytest.raises(ConfigError, match="without checkpoints"):
        make_loop().save()
