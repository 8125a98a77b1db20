"""Masking schedules: closed forms against the definitions they are closed forms of."""

import math

import pytest
import torch
from effml_diffusion.schedules import Polynomial, PolynomialMask, Schedule, schedule
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st

NAMES = [
    "linear",
    "loglinear(1e-3)",
    "cosine",
    "cosine(1e-3)",
    "cosine_dllm",
    "polynomial(2)",
    "polynomial(0.5)",
    "polynomial_mask(2)",
    "polynomial_mask(3)",
    "geometric(1e-5, 20)",
]
TIMES = torch.linspace(0.0, 1.0, 41, dtype=torch.float64)
INNER = TIMES[1:-1]


@pytest.mark.parametrize("name", NAMES)
class TestEverySchedule:
    def test_falls_from_one_to_eps(self, name: str) -> None:
        s = schedule(name)
        alpha = s.alpha(TIMES)
        assert (alpha.diff() < 0).all()
        assert float(alpha[0]) == pytest.approx(1, abs=1e-15 if "geometric" not in name else 2e-5)
        assert float(alpha[-1]) == pytest.approx(s.eps, abs=1e-15 if "geometric" not in name else 1e-8)
        torch.testing.assert_close(alpha + s.mask_level(TIMES), torch.ones_like(TIMES), rtol=0, atol=1e-15)

    def test_derivative_is_the_slope(self, name: str) -> None:
        t = INNER.clone().requires_grad_()
        (slope,) = torch.autograd.grad(schedule(name).alpha(t).sum(), t)
        torch.testing.assert_close(schedule(name).dalpha(INNER), slope, rtol=1e-12, atol=0)

    def test_weight_is_its_definition(self, name: str) -> None:
        s = schedule(name)
        torch.testing.assert_close(s.weight(INNER), -s.dalpha(INNER) / s.mask_level(INNER), rtol=1e-12, atol=0)

    def test_inverse_undoes_alpha(self, name: str) -> None:
        s = schedule(name)
        torch.testing.assert_close(s.inverse(s.alpha(TIMES)), TIMES, rtol=0, atol=1e-7 if name == "cosine" else 1e-8)
        ends = s.inverse(torch.tensor([0.0, 1.0]))
        assert ends.tolist() == pytest.approx([1.0, 0.0], abs=1e-12)

    def test_hazards_multiply(self, name: str) -> None:
        s = schedule(name)
        t, s_, r = torch.tensor(0.9), torch.tensor(0.5), torch.tensor(0.2)
        stays = (1 - s.hazard(t, s_)) * (1 - s.hazard(s_, r))
        torch.testing.assert_close(stays, 1 - s.hazard(t, r), rtol=1e-12, atol=0)
        if "geometric" not in name:
            assert s.hazard(t, torch.zeros(())) == 1
            assert s.hazard(0.0, 0.0) == 1

    def test_numbers_give_numbers(self, name: str) -> None:
        s = schedule(name)
        for method in (s.alpha, s.mask_level, s.dalpha, s.weight, s.inverse):
            number = method(0.5)
            assert isinstance(number, float)
            tensor = method(torch.tensor([[0.5]], dtype=torch.float32))
            assert tensor.dtype == torch.float64
            assert tensor.tolist() == [[number]]


def test_weight_of_the_log_linear_schedule_is_free_of_eps() -> None:
    """MDLM's own form: sigma'(t) / expm1(sigma(t)) with sigma = -log(1 - (1 - eps) t)."""
    eps, t = 1e-3, torch.linspace(1e-3, 1, 200, dtype=torch.float64)
    sigma, slope = -torch.log1p(-(1 - eps) * t), (1 - eps) / (1 - (1 - eps) * t)
    torch.testing.assert_close(slope / torch.expm1(sigma), 1 / t, rtol=1e-6, atol=0)
    torch.testing.assert_close(schedule("loglinear(1e-3)").weight(t), 1 / t, rtol=0, atol=0)
    assert schedule("linear").weight(0.25) == 4.0
    assert schedule("polynomial_mask(2)").weight(0.5) == 4.0


@pytest.mark.parametrize("name", NAMES)
def test_small_levels_keep_their_digits(name: str) -> None:
    """1 - alpha by subtraction has none left at t = 1e-12."""
    s, t = schedule(name), 1e-12
    if "geometric" not in name:
        order = {"cosine": 2, "cosine(1e-3)": 2, "polynomial_mask(2)": 2, "polynomial_mask(3)": 3}.get(name, 1)
        assert s.weight(t) * t == pytest.approx(order, rel=1e-9)
        assert s.hazard(t, t / 2) == pytest.approx(1 - 0.5**order, rel=1e-9)


@given(st.floats(0, 1), st.floats(0, 1))
def test_hazard_is_a_probability(a: float, b: float) -> None:
    for name in NAMES:
        assert 0 <= schedule(name).hazard(max(a, b), min(a, b)) <= 1


def test_names_are_parsed() -> None:
    assert schedule(" polynomial( 2 ) ") == Polynomial(2.0)
    assert schedule("loglinear(0.01)") == PolynomialMask(1.0, 0.01)
    assert schedule("linear") == schedule("loglinear(0)") == schedule("polynomial_mask(1)")
    own = schedule("cosine")
    assert isinstance(own, Schedule)
    assert schedule(own) is own


@pytest.mark.parametrize(
    "name", ["cosin", "linear(1)", "polynomial", "polynomial()", "polynomial(x)", "geometric(1)", 3]
)
def test_wrong_names_say_the_right_ones(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^schedule: got .*expected a Schedule or one of linear, .*geometric\(m, M\)$"
    ):
        schedule(name)


def test_wrong_numbers_are_refused() -> None:
    for name in ("polynomial(-1)", "polynomial_mask(0)", "polynomial(nan)", "polynomial(inf)"):
        with pytest.raises(ConfigError, match=r"n: got .*, expected a finite number > 0"):
            schedule(name)
    for name in ("loglinear(1)", "cosine(-0.1)", "cosine(nan)"):
        with pytest.raises(ConfigError, match=r"eps: got"):
            schedule(name)
    for name in ("geometric(3, 2)", "geometric(0, 2)", "geometric(1, inf)"):
        with pytest.raises(ConfigError, match=r"geometric: got m=.* expected 0 < m < M"):
            schedule(name)


def test_times_outside_the_unit_interval_are_refused() -> None:
    s = schedule("linear")
    for t in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match=r"^t: got .*, expected numbers in \[0, 1\]$"):
            s.alpha(t)
        with pytest.raises(ConfigError, match=r"^t: got .*, expected numbers in \[0, 1\]$"):
            s.weight(torch.tensor([0.5, t]))
    with pytest.raises(ConfigError, match=r"^a: got 2.0"):
        s.inverse(2.0)
    with pytest.raises(ConfigError, match=r"^s: got 0.6, expected a time no later than t$"):
        s.hazard(torch.tensor([0.7, 0.5]), torch.tensor(0.6, dtype=torch.float64))
