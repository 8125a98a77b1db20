import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from effml_quant.instability.proxy import ProxyConfig, ResidualMLP, StudentTeacher, proxy_loss
from effml_quant.precision.application import apply_scheme
from effml_quant.precision.scheme import PrecisionScheme
from effml_shared.errors import CheckpointError, ConfigError
from effml_shared.loop import Budget, Loop
from effml_shared.schedules import Plan
from effml_shared.steps import GradientStep


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("activation", ["gelu", "relu", "identity"])
def test_parameters_are_counted_as_in_the_paper(activation):
    d, depth = 48, 3
    assert count(ResidualMLP(ProxyConfig(d, depth, activation))) == depth * (8 * d * d + d + 2 * d)


@pytest.mark.parametrize("d", [48, 50, 64])
def test_parameters_with_swiglu(d):
    h = round(8 * d / 3)
    proxy = StudentTeacher(ProxyConfig(d, 2, "swiglu", teacher_width=32))
    assert count(proxy.student) == 2 * (2 * h * d + h * d + 3 * d)
    assert count(proxy.teacher) == 2 * 3 * round(2 * 32 / 3) * d


def test_the_student_computes_the_formula():
    proxy = StudentTeacher(ProxyConfig(12, 2, seed=3))
    student = proxy.student.double()
    x = want = torch.randn(5, 12, dtype=torch.float64)
    for block in student.blocks:
        centred = want - want.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.norm.weight
        u = normed @ block.up.weight.T
        phi = u * 0.5 * (1 + torch.erf(u / math.sqrt(2)))
        want = want + phi @ block.down.weight.T + block.down.bias
    torch.testing.assert_close(student(x), want)
    hidden = x.float()
    for first, second in zip(proxy.teacher[::3], proxy.teacher[2::3], strict=True):
        hidden = F.gelu(hidden @ first.weight.T) @ second.weight.T
    torch.testing.assert_close(proxy.teacher(x.float()), hidden)


def test_swiglu_gates_with_the_second_half():
    student = ResidualMLP(ProxyConfig(6, 1, "swiglu", norm=False)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    a, c = (x @ student.blocks[0].up.weight.T).chunk(2, dim=-1)
    block = student.blocks[0]
    torch.testing.assert_close(student(x), x + (a * c * torch.sigmoid(c)) @ block.down.weight.T + block.down.bias)
    assert student.gains() == []


def test_the_first_loss_is_that_of_the_identity_path():
    losses = []
    for seed in range(4):
        proxy = StudentTeacher(ProxyConfig(64, 4, seed=seed))
        total, terms = proxy_loss(proxy.student, proxy.data().next(512))
        losses.append(float(total.detach()) / float(terms))
    assert all(1.05 < loss < 1.3 for loss in losses)


def test_low_gain_is_xavier_normal_and_leaves_the_teacher_as_it_is():
    student = ResidualMLP(ProxyConfig(256, 1, init="low_gain"))
    down = student.blocks[0].down.requires_grad_(False)
    assert float(down.weight.std()) == pytest.approx(0.5 * math.sqrt(2 / (5 * 256)), rel=0.02)
    assert not down.bias.any()
    default = ResidualMLP(ProxyConfig(256, 1)).blocks[0].down.requires_grad_(False)
    assert float(default.bias.abs().max()) == pytest.approx(1 / 32, rel=0.02)
    assert float(default.weight.abs().max()) == pytest.approx(1 / 32, rel=0.01)


def test_one_seed_is_one_problem_and_batches_depend_on_their_number_alone():
    first, second = (StudentTeacher(ProxyConfig(8, 1, seed=5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.student.parameters(), second.student.parameters(), strict=True))
    data, other = first.data(), second.data()
    torch.rand(3)  # global draws change nothing
    drawn = [data.next(4) for _ in range(3)]
    other.load_state_dict({"position": 2})
    again = other.next(4)
    assert all(torch.equal(again[key], drawn[2][key]) for key in ("inputs", "targets"))
    assert data.state_dict() == {"position": 3}
    assert not torch.equal(first.held_out(1, 4)[0]["inputs"], drawn[0]["inputs"])
    assert not torch.equal(StudentTeacher(ProxyConfig(8, 1, seed=6)).data().next(4)["inputs"], drawn[0]["inputs"])


def test_targets_are_the_teachers_outputs_and_noise_even_under_autocast():
    clean, noisy = (StudentTeacher(ProxyConfig(16, 2, noise_std=std)) for std in (0.0, 0.5))
    batch = clean.data().next(4096)
    assert torch.equal(batch["targets"], clean.teacher(batch["inputs"]))
    with torch.autocast("cpu", torch.bfloat16):
        again, other = clean.data().next(4096), noisy.data().next(4096)
    assert torch.equal(again["targets"], batch["targets"])
    assert float((other["targets"] - batch["targets"]).std()) == pytest.approx(0.5, rel=0.02)
    assert not any(parameter.requires_grad for parameter in clean.teacher.parameters())


def test_a_scheme_on_the_student_changes_nothing_of_what_it_is_asked_to_learn():
    proxy = StudentTeacher(ProxyConfig(32, 2, seed=4))
    before = proxy.data().next(8)
    exact = proxy.student(before["inputs"])
    handle = apply_scheme(proxy.student, PrecisionScheme.mx("mxfp4", norm_affine="mxfp4"))
    after = proxy.data().next(8)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not torch.equal(proxy.student(before["inputs"]), exact)
    assert len(handle.layers) == 4
    handle.restore()
    assert torch.equal(proxy.student(before["inputs"]), exact)


def test_the_loop_trains_it_and_the_loss_is_a_mean_over_batch_and_features():
    proxy = StudentTeacher(ProxyConfig(16, 2, seed=1))
    batch = proxy.data().next(8)
    mean = F.mse_loss(proxy.student(batch["inputs"]), batch["targets"])
    step = GradientStep(proxy.student, torch.optim.Adam(proxy.student.parameters(), 1e-2), proxy_loss, micro_batch=4)
    seen = []
    step_loss = step.__call__
    loop = Loop(
        lambda b, p: seen.append(m := step_loss(b, p)) or m, proxy.data(), lambda clock: Plan(8), budget=Budget(60)
    )
    loop.run()
    assert seen[0]["loss"] == pytest.approx(float(mean.detach()), rel=1e-6)
    assert seen[0]["tokens"] == 8
    assert seen[-1]["loss"] < 0.5 * seen[0]["loss"]


@pytest.mark.parametrize(
    "field",
    [{"width": 0}, {"depth": 1.5}, {"teacher_depth": 0}, {"activation": "tanh"}, {"init": "zero"}, {"noise_std": -1.0}],
)
def test_wrong_fields_are_named(field):
    with pytest.raises(ConfigError, match=f"^{next(iter(field))}: got"):
        ProxyConfig(**field)


def test_a_position_that_is_none_is_refused():
    data = StudentTeacher(ProxyConfig(4, 1)).data()
    for state in ({}, {"position": -1}, {"position": "3"}):
        with pytest.raises(CheckpointError, match="a number of batches"):
            data.load_state_dict(state)
    with pytest.raises(ConfigError, match="batch_size"):
        data.next(0)
    assert dataclasses.replace(ProxyConfig(), teacher_width=8).teacher_width == 8
