import math

import pytest
import torch
import torch.nn.functional as F
from effml_quant.instability.gradient_bias import (
    GradientBias,
    GradientBiasMeter,
    compare_gradients,
    isolate,
    roles_of,
    total,
)
from effml_quant.instability.proxy import ProxyConfig, StudentTeacher, proxy_loss
from effml_quant.precision.application import apply_scheme
from effml_quant.precision.scheme import PrecisionScheme
from effml_shared.errors import ConfigError
from effml_shared.loop import Budget, Loop
from effml_shared.schedules import Plan
from effml_shared.steps import GradientStep
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

ALL = PrecisionScheme.mx("mxfp4", vector=None, norm_affine="mxfp4")


def gradients(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=dtype)
        for name, shape in {"a.weight": (5, 3), "a.bias": (5,), "b.weight": (2, 7)}.items()
    }


@given(st.floats(-3, 3), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_a_multiple_of_the_gradient(c, seed):
    g = gradients(seed)
    bias = total(compare_gradients(g, {name: c * grad for name, grad in g.items()}))
    assert bias.rho == pytest.approx(abs(c - 1), abs=1e-12)
    assert bias.ratio == pytest.approx(abs(c), abs=1e-12)
    if abs(c) > 1e-6:
        assert bias.cos == pytest.approx(math.copysign(1, c))


def test_an_equal_gradient():
    bias = total(compare_gradients(gradients(0), gradients(0)))
    assert (bias.rho, bias.ratio) == (0.0, 1.0)
    assert bias.cos == pytest.approx(1.0, abs=1e-15)


@given(st.integers(0, 50), st.integers(51, 99))
@settings(max_examples=20, deadline=None)
def test_rho_ratio_and_cosine_are_tied_and_groups_add_up(one, other):
    g, q = gradients(one), gradients(other)
    groups = compare_gradients(g, q)
    assert set(groups) == {"a", "b"}
    bias = total(groups)
    assert bias.rho**2 == pytest.approx(1 + bias.ratio**2 - 2 * bias.ratio * bias.cos, abs=1e-10)
    flat, other_flat = (torch.cat([t.flatten() for t in grads.values()]) for grads in (g, q))
    assert bias.rho == pytest.approx(float((other_flat - flat).norm() / flat.norm()))
    assert bias.cos == pytest.approx(float(F.cosine_similarity(flat, other_flat, dim=0)))
    assert bias.mean_bias == pytest.approx(float(other_flat.mean() - flat.mean()))
    assert bias.entries == 34
    for values in zip(bias, *compare_gradients(g, q, "parameter").values(), strict=True):
        assert values[0] == pytest.approx(sum(values[1:]))


def test_missing_gradients_are_zero_and_degenerate_ones_have_no_angle():
    g = {"w": torch.ones(3), "b": None}
    lost = total(compare_gradients(g, {"w": None, "b": None}))
    assert (lost.rho, lost.ratio, lost.entries) == (1.0, 0.0, 3)
    assert math.isnan(lost.cos)
    made = total(compare_gradients({"w": None}, {"w": torch.ones(2)}))
    assert (made.rho, made.ratio) == (math.inf, math.inf)
    assert GradientBias().rho == 0
    assert math.isnan(total(compare_gradients({"w": torch.tensor([math.nan])}, {"w": torch.ones(1)})).rho)
    with pytest.raises(ConfigError, match="gradients: got 'w'"):
        compare_gradients({"w": None}, {})
    with pytest.raises(ConfigError, match="groups: got 'layer'"):
        compare_gradients({}, {}, "layer")
    assert set(compare_gradients(gradients(0), gradients(1), lambda name: name[-4:])) == {"ight", "bias"}


def make(seed=0, scheme=ALL, **fields):
    proxy = StudentTeacher(ProxyConfig(32, 2, seed=seed))
    handle = apply_scheme(proxy.student, scheme)
    return proxy, handle, GradientBiasMeter(handle, proxy_loss, **fields)


def test_the_meter_measures_what_two_backward_passes_by_hand_give():
    proxy, handle, meter = make()
    batches = proxy.held_out(2, 64)
    by_hand = GradientBias()
    for batch in batches:
        found = []
        for scheme in (None, ALL):
            proxy.student.zero_grad()
            with handle.using(scheme):
                F.mse_loss(proxy.student(batch["inputs"]), batch["targets"]).backward()
            found.append({name: p.grad.clone() for name, p in proxy.student.named_parameters()})
        by_hand += total(compare_gradients(*found))
    readings = meter.measure(*batches)
    assert readings["bias/rho"] == pytest.approx(by_hand.rho, rel=1e-5)
    assert readings["bias/cos"] == pytest.approx(by_hand.cos, rel=1e-5)
    assert 0.05 < by_hand.rho < 1
    groups = meter.compare(*batches, schemes={"all": ALL, "none": None})
    assert total(groups["none"]).rho == 0
    assert {"blocks.0.norm", "blocks.1.up", "blocks.1.down"} < set(groups["all"])
    assert total(groups["all"]).exact == pytest.approx(total(groups["none"]).exact)


def test_the_bias_of_an_untrained_proxy_as_measured_elsewhere():
    """Width 64, depth 4, eight batches of 256; an independent emulator found these within 2% over six seeds."""
    proxy = StudentTeacher(ProxyConfig(64, 4, seed=2))
    meter = GradientBiasMeter(apply_scheme(proxy.student, None), proxy_loss)

    def mx(fmt="mxfp8_e4m3", **fields):
        return PrecisionScheme.mx(fmt, **{"vector": None, "norm_affine": fmt, **fields})

    schemes = {"all": mx(), "rceil": mx(scale_rule="rceil"), "E2M3": mx("mxfp6_e2m3"), "E2M1": mx("mxfp4")}
    schemes |= {"forward": mx(quantize_backward=False), "exempt": mx(norm_affine=None)}
    found = meter.compare(*proxy.held_out(8, 256), schemes=schemes)
    rho = {name: total(groups).rho for name, groups in found.items()}
    want = {"all": 0.0815, "rceil": 0.0375, "E2M3": 0.0445, "E2M1": 0.2645, "forward": 0.069, "exempt": rho["all"]}
    assert rho == pytest.approx(want, rel=0.06)
    assert rho["exempt"] == rho["all"]  # gains of 1 are exact


def test_it_leaves_everything_as_it_was():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(F.dropout(x, 0.5))

    model = Noisy(nn.Linear(8, 8), nn.BatchNorm1d(8))
    handle = apply_scheme(model, ALL.replace(norm_affine=None, rounding="stochastic", scale_rule="rceil"))
    model(torch.randn(4, 8)).sum().backward()
    grads = [p.grad for p in model.parameters()]
    copies = [g.clone() for g in grads]
    buffers = [b.clone() for b in model.buffers()]
    meter = GradientBiasMeter(handle, lambda m, x: (m(x).square().sum(), torch.tensor(x.numel())))
    state = torch.get_rng_state()
    scheme = handle.scheme
    first = meter.measure(torch.ones(16, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert meter.measure(torch.ones(16, 8)) == first  # the same random state: the same dropout
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert all(map(torch.equal, grads, copies))
    assert all(map(torch.equal, model.buffers(), buffers))
    assert handle.scheme is scheme
    model.eval()
    meter.measure(torch.ones(4, 8))
    assert not model.training


def test_gradients_come_back_even_if_the_loss_fails():
    proxy, handle, meter = make()
    parameter = next(proxy.student.parameters())
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(KeyError):
        meter.measure({"inputs": torch.ones(2, 32)})
    assert float(parameter.grad.detach().mean()) == 1
    assert handle.scheme is ALL


def test_roles_are_taken_one_at_a_time():
    proxy, _, meter = make()
    roles = ["w_fwd", "a_fwd", "w_bwd", "a_bwd", "g_dw", "g_dx", "norm_affine"]
    assert roles_of(ALL) == roles
    assert roles_of(ALL.replace(quantize_backward=False)) == ["w_fwd", "a_fwd", "norm_affine"]
    alone = isolate(ALL, "g_dw")
    assert roles_of(alone) == ["g_dw"]
    assert roles_of(isolate(PrecisionScheme(), "vector")) == ["vector"]
    found = meter.decompose(*proxy.held_out(1, 64))
    assert list(found) == ["all", *roles]
    assert all(found[role].rho > 0 for role in roles if role != "norm_affine")
    assert found["norm_affine"].rho == 0  # gains of 1 and biases of 0 are exact
    only_dw = meter.compare(*proxy.held_out(1, 64), schemes={"g_dw": alone})["g_dw"]
    assert only_dw["blocks.0.norm"].rho == 0  # what G is in dW reaches no other gradient
    assert only_dw["blocks.0.up"].rho > 0
    with pytest.raises(ConfigError, match="scheme: got None"):
        make(scheme=None)[2].decompose(*proxy.held_out(1, 8))
    with pytest.raises(ConfigError, match="batches: got none"):
        meter.compare(schemes={"": None})


def test_in_the_loop_it_reads_the_coming_batch_and_changes_no_step():
    def train(every):
        proxy, _, meter = make(every=every or 1, detail=True)
        step = GradientStep(proxy.student, torch.optim.Adam(proxy.student.parameters(), 1e-2), proxy_loss)
        seen = []

        class Record:
            def on_start(self, loop): ...

            def on_end(self, loop): ...

            def on_step(self, loop, metrics):
                seen.append(dict(metrics))

        hooks = [meter, Record()] if every else [Record()]
        Loop(step, proxy.data(), lambda clock: Plan(16), budget=Budget(steps=4), hooks=hooks).run()
        return seen, meter, proxy

    plain, _, _ = train(None)
    probed, _, _ = train(2)
    assert [row["loss"] for row in plain] == [row["loss"] for row in probed]
    assert ["bias/rho" in row for row in probed] == [False, True, False, True]
    assert "bias/rho/blocks.1.up" in probed[1]
    _, meter, proxy = train(4)
    data = proxy.data()
    data.load_state_dict({"position": 4})
    assert meter.measure(data.next(16))["bias/rho"] > 0


def test_sums_are_accurate_where_float32_is_not():
    g = {"w": torch.full((1 << 16,), 1.0) + 1e-4 * torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))}
    q = {"w": g["w"] * (1 + 1e-6)}
    exact = ((q["w"].double() - g["w"].double()).norm() / g["w"].double().norm()).item()
    assert total(compare_gradients(g, q)).rho == pytest.approx(exact, rel=1e-12)
