import pytest
import torch
from effml_quant.precision.application import apply_scheme
from effml_quant.precision.scheme import PrecisionScheme
from effml_quant.precision.switching import PrecisionSwitch
from effml_shared import seeding
from effml_shared.checkpoint import Checkpoints
from effml_shared.errors import ConfigError
from effml_shared.loop import Budget, Hook, Loop
from effml_shared.schedules import Plan
from effml_shared.steps import GradientStep
from torch import nn

MX4 = PrecisionScheme.mx("mxfp4", norm_affine="mxfp4", gradient_rounding="stochastic")
OTHER = PrecisionScheme.bf16_act_all("mxfp8_e4m3")


class Points:
    """An endless stream, indexed by samples."""

    def __init__(self):
        self.position = 0

    def next(self, batch_size):
        self.position += batch_size
        return torch.randn(batch_size, 32, generator=seeding.generator(0, self.position))

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def loss(model, x):
    return (model(x).squeeze(-1) - x.sum(1)).square().sum(), torch.tensor(len(x))


class Trace(Hook):
    def __init__(self, handle):
        self.handle, self.schemes, self.losses = handle, [], []

    def on_step(self, loop, metrics):
        self.schemes.append(self.handle.scheme)
        self.losses.append(metrics["loss"])


def run(schedule, steps, *, scheme=None, checkpoints=None, switch=True):
    """Train for a while; returns the trace, the weights and Adam's moments."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 1))
    handle = apply_scheme(model, scheme)
    step = GradientStep(model, torch.optim.Adam(model.parameters(), lr=0.01), loss)
    trace = Trace(handle)
    hooks = [trace, PrecisionSwitch(handle, schedule)] if switch else [trace]
    loop = Loop(step, Points(), lambda clock: Plan(8), budget=Budget(steps=steps), hooks=hooks, checkpoints=checkpoints)
    loop.run()
    moments = [m for state in step.optimizer.state.values() for m in (state["exp_avg"], state["exp_avg_sq"])]
    return trace, [*(p.detach() for p in model.parameters()), *moments], loop


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_scheme_holds_from_its_step_on():
    trace, weights, _ = run({0: MX4, 3: None, 5: OTHER}, 7)
    assert trace.schemes == [MX4] * 3 + [None] * 2 + [OTHER] * 2
    parts = run({0: MX4}, 3)[1]
    assert not same(weights, parts)
    assert run({0: MX4}, 3)[0].losses == trace.losses[:3]


def test_there_and_back_leaves_the_run_bitwise_equal():
    class Flicker(Hook):
        def __init__(self, handle):
            self.handle = handle

        def on_step(self, loop, metrics):
            before = self.handle.scheme
            for scheme in (None, OTHER, before):
                self.handle.set(scheme)

    trace, weights, _ = run({}, 6, scheme=MX4)
    hook = PrecisionSwitch(trace.handle, {})
    assert hook.state_dict() == {"scheme": MX4.to_dict()}
    assert same(run({}, 6, scheme=MX4, switch=False)[1], weights)
    assert same(run({2: MX4}, 6, scheme=MX4)[1], weights)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 1))
    handle = apply_scheme(model, MX4)
    step = GradientStep(model, torch.optim.Adam(model.parameters(), lr=0.01), loss)
    Loop(step, Points(), lambda clock: Plan(8), budget=Budget(steps=6), hooks=[Flicker(handle)]).run()
    assert same([p.detach() for p in model.parameters()], weights[:6])


def test_a_resumed_run_equals_the_continuous_one(tmp_path):
    _, expected, _ = run({4: OTHER}, 8, scheme=MX4)
    run({}, 4, scheme=MX4, checkpoints=Checkpoints(tmp_path / "a"))
    trace, found, _ = run({4: OTHER}, 8, checkpoints=Checkpoints(tmp_path / "a"))  # another scheme from here on
    assert trace.schemes == [OTHER] * 4
    assert same(found, expected)
    run({4: OTHER}, 6, scheme=MX4, checkpoints=Checkpoints(tmp_path / "b"))
    trace, found, _ = run({4: OTHER}, 8, checkpoints=Checkpoints(tmp_path / "b"))  # the switch is in the past
    assert trace.schemes == [OTHER] * 2
    assert same(found, expected)


def test_a_scheme_that_somebody_else_set_is_resumed(tmp_path):
    trace, _, loop = run({1: OTHER}, 3, checkpoints=Checkpoints(tmp_path))
    trace.handle.set(MX4)
    loop.save()
    trace, _, _ = run({1: OTHER}, 5, checkpoints=Checkpoints(tmp_path))
    assert trace.schemes == [MX4, MX4]


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({-1: None}, r"schedule: got step -1"),
        ({"3": None}, r"schedule: got step '3', expected an integer"),
        ({3: "mxfp4"}, r"schedule: got 'mxfp4' at step 3, expected a PrecisionScheme"),
        ({5: None}, r"schedule: got step 5, expected one before the run ends, at 5"),
    ],
)
def test_a_bad_schedule_is_named(schedule, message):
    with pytest.raises(ConfigError, match=message):
        run(schedule, 5)


def test_a_scheme_that_the_model_cannot_have_is_refused_before_the_run():
    handle = apply_scheme(nn.Sequential(nn.Linear(4, 4)).half(), None)
    with pytest.raises(ConfigError, match=r"0\.weight: got float16"):
        PrecisionSwitch(handle, {100: MX4})
