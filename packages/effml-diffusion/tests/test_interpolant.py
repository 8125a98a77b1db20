from __future__ import annotations

import math

import pytest
import torch
from effml_diffusion.flex.interpolant import FlowSchedule, Interpolant, gauss_legendre
from effml_diffusion.schedules import schedule
from torch import Tensor

HALF = {  # P(absent), P(mask), P(clean) at t = 1/2
    ("linear", "linear"): (0.5, 0.346574, 0.153426),
    ("cosine", "linear"): (0.292893, 0.480496, 0.226611),  # the paper's sin
    ("polynomial(2)", "linear"): (0.75, 0.193147, 0.056853),
}
NAMES = ["linear", "cosine", "cosine_dllm", "polynomial(2)", "polynomial_mask(3)", "geometric(0.01, 10)"]


def shares(interpolant: Interpolant, t: float, n: int, seed: int = 0) -> Tensor:
    """Of n tokens, how many are absent, masked and clean at t."""
    appears, revealed = interpolant.hitting_times((n,), generator=torch.Generator().manual_seed(seed))
    assert bool((appears <= revealed).all())
    assert appears.min() >= 0
    assert revealed.max() <= 1
    absent, masked = t < appears, (t >= appears) & (t < revealed)
    return torch.stack([absent, masked, t >= revealed]).double().mean(1)


@pytest.mark.parametrize(("names", "expected"), HALF.items(), ids=str)
def test_marginals(names: tuple[str, str], expected: tuple[float, float, float]) -> None:
    interpolant = Interpolant.of(*names)
    exact = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(
        interpolant.state_probabilities(torch.tensor(0.5)), exact, atol=6e-7, rtol=0.0
    )  # the six digits printed
    sigma = (exact * (1 - exact) / 1e6).sqrt()
    assert bool(((shares(interpolant, 0.5, 10**6) - exact).abs() < 4 * sigma).all())


@pytest.mark.parametrize("insert", NAMES)
@pytest.mark.parametrize("unmask", ["linear", "polynomial_mask(3)", "geometric(0.01, 10)"])
def test_state_probabilities_equal_frequencies_for_every_pair(insert: str, unmask: str) -> None:
    interpolant = Interpolant.of(insert, unmask)
    for t in (0.2, 0.9):
        exact = interpolant.state_probabilities(torch.tensor(t))
        assert exact.sum().item() == pytest.approx(1.0, abs=1e-12)
        sigma = (exact * (1 - exact) / 1e5).sqrt() + 1e-9
        assert bool(((shares(interpolant, t, 10**5) - exact).abs() < 4.5 * sigma).all())


def test_state_probabilities_in_closed_form_and_at_the_ends() -> None:
    t = torch.tensor([0.0, 1e-6, 0.3, 0.99, 1.0], dtype=torch.float64)
    found = Interpolant.of("linear", "linear").state_probabilities(t)
    mask = -torch.special.xlogy(1 - t, 1 - t)
    torch.testing.assert_close(found, torch.stack([1 - t, mask, t - mask], dim=-1), atol=1e-10, rtol=0.0)


def test_a_flow_schedule_is_a_masking_schedule_read_backwards() -> None:
    t = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    sin = FlowSchedule(schedule("cosine"))
    torch.testing.assert_close(sin.value(t), torch.sin(math.pi * t / 2))
    torch.testing.assert_close(FlowSchedule(schedule("cosine_dllm")).rate(t), math.pi / 2 * torch.tan(math.pi * t / 2))
    for name in NAMES:
        flow = FlowSchedule(schedule(name))
        a, step = flow.value(t), 1e-6
        slope = (flow.value(t + step) - flow.value(t - step)) / (2 * step)
        torch.testing.assert_close(flow.rate(t), slope / (1 - a), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(flow.hazard(t[:-1], t[1:]), (a[1:] - a[:-1]) / (1 - a[:-1]), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(flow.inverse(a), t)


def test_a_time_after_another_follows_the_truncated_law() -> None:
    flow = FlowSchedule(schedule("cosine"))
    start, u = torch.tensor([0.0, 0.3, 0.999999]), torch.tensor([0.5, 0.5, 0.0])
    later = flow.inverse_after(start, u)
    a = flow.value(start)
    torch.testing.assert_close(flow.value(later), a + (1 - a) * u)
    assert bool((later >= start).all())


def test_a_linear_grid_of_n_steps_has_hazards_one_over_what_is_left() -> None:
    grid = torch.arange(9) / 8
    hazards = FlowSchedule(schedule("linear")).hazard(grid[:-1], grid[1:])
    torch.testing.assert_close(hazards, 1 / torch.arange(8, 0, -1).double())


def test_schedules_that_lose_tokens_say_so() -> None:
    assert all(FlowSchedule(schedule(name)).complete for name in NAMES[:-1])
    assert not FlowSchedule(schedule("geometric(0.01, 10)")).complete
    assert not FlowSchedule(schedule("loglinear(1e-3)")).complete


def test_times_of_an_incomplete_schedule_are_clamped() -> None:
    flow = FlowSchedule(schedule("geometric(0.01, 10)"))
    assert flow.value(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([4.54e-5, 0.99005], rel=1e-3)
    assert flow.inverse(torch.tensor([0.0, 1e-5, 0.995, 1.0])).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_quadrature_integrates_polynomials_exactly() -> None:
    nodes, weights = gauss_legendre(12)
    for power in range(24):
        assert float((weights * nodes**power).sum()) == pytest.approx(1 / (power + 1), rel=1e-12)
