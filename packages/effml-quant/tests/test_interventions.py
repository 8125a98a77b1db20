import pytest
import torch
from effml_quant.instability.interventions import INTERVENTIONS, intervene, run_intervention
from effml_quant.instability.proxy import ProxyConfig, StudentTeacher, proxy_loss
from effml_quant.precision.application import apply_scheme
from effml_quant.precision.scheme import PrecisionScheme
from effml_shared.checkpoint import Checkpoints
from effml_shared.errors import ConfigError
from effml_shared.loop import Budget, Hook, Loop
from effml_shared.schedules import Plan
from effml_shared.steps import GradientStep

E4M3 = "mxfp8_e4m3"
MX = PrecisionScheme(norm_affine=E4M3)
ROLES = ("w_fwd", "w_bwd", "a_fwd", "a_bwd", "g_dw", "g_dx")


def formats(scheme):
    return [None if (fmt := scheme.format(role)) is None else fmt.name for role in ROLES]


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("bf16_act", {"a_fwd", "a_bwd"}),
        ("bf16_act_all", {"a_fwd", "a_bwd", "g_dw", "g_dx"}),
        ("bf16_weight", {"w_fwd"}),
        ("bf16_weight_all", {"w_fwd", "w_bwd"}),
        ("bump_exponent", set()),
        ("forward_only", set()),
    ],
)
def test_formats_after_each_intervention(name, bf16):
    changed = intervene(name, MX)
    assert formats(changed) == ["bfloat16" if role in bf16 else E4M3 for role in ROLES]
    assert changed.norm_affine == E4M3
    assert changed.quantize_backward == (name != "forward_only")
    assert changed.scale_rule == ("bump" if name == "bump_exponent" else "floor")


def test_the_other_interventions():
    assert intervene("fp32", MX) is None
    assert intervene("no_norm_quant", MX) == MX.replace(norm_affine=None)
    assert intervene("no_gelu_quant", MX).format("activation") is None
    assert MX.format("activation").name == "bfloat16"
    assert intervene("bf16_act", MX) != MX.replace(a_fwd="bfloat16")  # there the gradients follow
    assert len(INTERVENTIONS) == 9
    with pytest.raises(ConfigError, match="did you mean 'bf16_act'"):
        intervene("bf16_acts", MX)


class Stop(Hook):
    """Keep the losses."""

    def __init__(self):
        self.losses = []

    def on_step(self, loop, metrics):
        self.losses.append(metrics["loss"])


def make(steps, checkpoints=None, scheme=MX, seed=0):
    proxy = StudentTeacher(ProxyConfig(32, 1, seed=1))
    handle = apply_scheme(proxy.student, scheme)
    step = GradientStep(proxy.student, torch.optim.Adam(proxy.student.parameters(), 1e-2), proxy_loss)
    seen = Stop()
    loop = Loop(
        step,
        proxy.data(),
        lambda clock: Plan(16, lr_factor=1 - clock.samples / 320),
        budget=Budget(steps=steps),
        hooks=[seen],
        checkpoints=checkpoints,
        seed=seed,
    )
    return loop, handle, seen


@pytest.fixture
def checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "first")
    make(6, checkpoints)[0].run()
    return checkpoints.load()


def test_going_on_unchanged_is_never_having_stopped(checkpoint):
    whole, _, seen = make(12)
    whole.run()
    loop, handle, after = make(12)
    clock = run_intervention("none", loop, handle, checkpoint)
    assert (clock.step, clock.samples) == (12, 192)
    assert after.losses == seen.losses[6:]  # moments, data, schedule and weights are all there
    assert handle.scheme == MX


def test_an_intervention_is_a_run_that_had_the_other_scheme_from_there(checkpoint):
    exact, handle, losses = make(12)
    run_intervention("fp32", exact, handle, checkpoint)
    assert handle.scheme is None
    plain, _, unquantised = make(12, scheme=None)
    plain.step.load_state_dict(checkpoint.state["step"])
    plain.data.load_state_dict(checkpoint.state["data"])
    plain.clock = type(plain.clock)(**checkpoint.state["clock"])
    plain.run()
    assert losses.losses == unquantised.losses
    fresh, other, restarted = make(12)
    run_intervention("none", fresh, other, checkpoint)
    assert restarted.losses != losses.losses


def test_a_continued_run_that_was_cut_goes_on_from_its_own_checkpoint(checkpoint, tmp_path):
    whole, handle, seen = make(12)
    run_intervention("bf16_act", whole, handle, checkpoint)
    first, handle, _ = make(9, Checkpoints(tmp_path / "second"))
    run_intervention("bf16_act", first, handle, checkpoint)
    second, handle, rest = make(12, Checkpoints(tmp_path / "second"))
    run_intervention("bf16_act", second, handle, checkpoint)
    assert rest.losses == seen.losses[3:]


def test_what_cannot_go_on_is_refused(checkpoint):
    loop, handle, _ = make(6)
    with pytest.raises(ConfigError, match="expected more than the 6 steps"):
        run_intervention("fp32", loop, handle, checkpoint)
    loop, handle, _ = make(12, scheme=None)
    with pytest.raises(ConfigError, match="scheme: got None"):
        run_intervention("fp32", loop, handle, checkpoint)
    with pytest.raises(ConfigError, match="intervention: got 'magic'"):
        run_intervention("magic", loop, handle, checkpoint, MX)
