import copy

import pytest
import torch
from effml_quant.instability.proxy import ProxyConfig, StudentTeacher, proxy_loss
from effml_quant.instability.rescaling import fold_gains, rescale_gains
from effml_quant.precision.application import apply_scheme
from effml_quant.precision.scheme import PrecisionScheme
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


def model(seed=0, dtype=torch.float32):
    student = StudentTeacher(ProxyConfig(16, 3, seed=seed)).student.to(dtype)
    torch.manual_seed(seed)
    for norm, _ in student.gains():
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return student


@given(st.floats(-4, 4).filter(lambda a: abs(a) > 1e-2), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_the_function_stays_the_same(factor, seed):
    student = model(seed, torch.float64)
    x = torch.randn(5, 16, dtype=torch.float64)
    before = student(x)
    rescale_gains(student.gains(), factor)
    torch.testing.assert_close(student(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factor", [0.25, 2.0, -1.0])
def test_bitwise_where_the_factor_is_a_power_of_two(factor):
    student, x = model(), torch.randn(5, 16)
    before = student(x)
    rescale_gains(student.gains(), factor)
    assert torch.equal(student(x), before)


@pytest.mark.parametrize("scheme", [PrecisionScheme.mx(), PrecisionScheme.mx("mxfp4", vector=None)])
def test_with_exempt_norms_low_precision_does_not_see_a_power_of_two_and_otherwise_it_does(scheme):
    proxy = StudentTeacher(ProxyConfig(64, 2, seed=0))
    handle, batch = apply_scheme(proxy.student, scheme), proxy.data().next(32)

    def loss(factor, changed):
        student = copy.deepcopy(proxy.student)
        rescale_gains(student.gains(), factor)
        with apply_scheme(student, None).using(changed):
            return float(proxy_loss(student, batch)[0].detach())

    assert handle.scheme == scheme
    assert loss(1.0, scheme) == loss(0.5, scheme) == loss(8.0, scheme)
    encoded = scheme.replace(norm_affine="mxfp8_e4m3")
    assert loss(0.97, encoded) != loss(1.0, encoded)
    assert loss(0.97, None) == pytest.approx(loss(1.0, None), rel=1e-5)


def test_a_factor_per_feature_and_several_readers():
    norm, readers = nn.LayerNorm(8), [nn.Linear(8, 3), nn.Linear(8, 5)]
    x = torch.randn(4, 8)
    before = [reader(norm(x)) for reader in readers]
    rescale_gains([(norm, readers)], torch.linspace(0.5, 3, 8))
    assert not torch.equal(norm.weight, torch.ones(8))
    for reader, want in zip(readers, before, strict=True):
        torch.testing.assert_close(reader(norm(x)), want)


def test_folding_leaves_gains_of_exactly_one():
    student, x = model(), torch.randn(5, 16)
    before = student(x)
    fold_gains(student.gains())
    assert all(torch.equal(norm.weight, torch.ones(16)) for norm, _ in student.gains())
    torch.testing.assert_close(student(x), before)


def test_a_norm_without_bias_and_one_of_another_library():
    class TheirRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((4,), 0.9))

        def forward(self, x):
            return self.weight * x / x.square().mean(-1, keepdim=True).sqrt()

    norm, linear, x = TheirRMSNorm(), nn.Linear(4, 4), torch.randn(3, 4)
    before = linear(norm(x))
    rescale_gains([(norm, linear)], 3.0)
    torch.testing.assert_close(linear(norm(x)), before)


def test_what_does_not_fit_is_refused_and_nothing_is_changed():
    norm, linear = nn.LayerNorm(4), nn.Linear(4, 4)
    before = copy.deepcopy(linear.state_dict())
    with pytest.raises(ConfigError, match="factor: got 0"):
        rescale_gains([(norm, linear)], 0)
    with pytest.raises(ConfigError, match="factor: got nan"):
        rescale_gains([(norm, linear)], float("nan"))
    with pytest.raises(ConfigError, match=r"factor: got shape \(3,\)"):
        rescale_gains([(norm, linear)], torch.ones(3))
    with pytest.raises(ConfigError, match="pairs: got a Identity without a gain"):
        rescale_gains([(norm, linear), (nn.Identity(), linear)], 2.0)
    with pytest.raises(ConfigError, match="without a gain"):
        rescale_gains([(nn.LayerNorm(4, elementwise_affine=False), linear)], 2.0)
    with pytest.raises(ConfigError, match="behind 4 features"):
        rescale_gains([(norm, linear), (norm, nn.Linear(5, 4))], 2.0)
    nn.init.zeros_(norm.weight)
    with pytest.raises(ConfigError, match="gains that are 0"):
        fold_gains([(norm, linear)])
    assert all(torch.equal(linear.state_dict()[key], before[key]) for key in before)
