"""The risk recursion against printed digits, closed forms, the d x d recursion and Monte-Carlo."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from effml_optim.seesaw.plan import SeesawPlan
from effml_optim.sgd_risk import Problem, gradient_moments, predict_linear, risk_curve
from effml_shared.errors import ConfigError
from numpy.typing import NDArray

SMALL = Problem([1.0, 0.25], sigma2=0.5, m0=[1.0, 4.0])
SPECTRUM = Problem.power_law(200, 1.5, sigma2=1.0)
ROOT2 = math.sqrt(2)


Matrix = NDArray[np.float64]


def printed(text: str) -> object:
    """Compare with a number to the last digit that is printed."""
    return pytest.approx(float(text), rel=0, abs=0.51 * 10.0 ** -len(text.partition(".")[2]))


def phases(lr: float, batch: float, a: float, b: float, count: int, first: int) -> tuple[list[float], list[float]]:
    """Return lr and batch of every step: `count` phases of equal samples, lr over `a` and batch times `b` in each."""
    lrs, batches = [], []
    for k in range(count):
        steps = round(first / b**k)
        lrs += [lr * a**-k] * steps
        batches += [batch * b**k] * steps
    return lrs, batches


def final(lr: float, batch: float, a: float, b: float, first: int = 4096, normalized: bool = True) -> float:
    lrs, batches = phases(lr, batch, a, b, 7, first)
    return float(risk_curve(SPECTRUM, lrs, batches, normalized=normalized, record=[len(lrs)]).excess[0])


def test_printed_steps_of_the_small_problem() -> None:
    curve = risk_curve(SMALL, 0.2, steps=3)
    # In exact arithmetic the risks are 1753/1600, 623427/640000 and 224558993/256000000.
    assert curve.risk == pytest.approx([1.25, 1.095625, 0.9741046875, 0.87718356640625], rel=1e-14)
    expected = [("0.78", "3.645"), ("0.61805", "3.320638"), ("0.498202", "3.024659")]
    for steps, m in enumerate(expected, start=1):
        assert risk_curve(SMALL, 0.2, steps=steps).m.tolist() == list(map(printed, m))
    assert risk_curve(SMALL, 0.2, batch=4, steps=1).m == pytest.approx([0.675, 3.61875], rel=1e-14)
    assert risk_curve(Problem([1.0], 0.5, delta0=[-1.0]), 0.1, steps=1).m == pytest.approx([0.835], rel=1e-14)


def test_a_constant_rate_ends_in_the_stationary_state() -> None:
    lr, eigvals = 0.2, SMALL.eigvals
    c = lr * float((eigvals / (2 - lr * 2 * eigvals)).sum())
    assert c == printed("0.1513157895")
    signal = SMALL.sigma2 * c / (1 - c)
    curve = risk_curve(SMALL, lr, steps=5000, record=1000)
    assert 2 * curve.excess[-1] == pytest.approx(signal, abs=1e-15) == printed("0.0891472868")
    assert curve.m.tolist() == [printed("0.073643"), printed("0.062016")]


@pytest.mark.parametrize(("batch", "limit"), [(1, 0.6438927748), (2, 0.9801185812), (8, 1.5947077252), (math.inf, 2.0)])
def test_the_limit_of_stability_divides_divergence_from_convergence(batch: float, limit: float) -> None:
    below = risk_curve(SMALL, 0.99 * limit, batch, 20_000, record=10_000)
    assert below.diverged_at is None
    assert below.excess[-1] == pytest.approx(below.excess[-2], rel=1e-9)
    above = risk_curve(SMALL, 1.01 * limit, batch, 20_000, record=10_000)
    assert above.diverged_at == above.steps[-1] < 20_000
    assert above.excess[-1] == math.inf


def test_divergence_in_one_step_is_an_answer_and_no_warning() -> None:
    curve = risk_curve(SMALL, 1e200, steps=9)
    assert (curve.diverged_at, curve.steps.tolist(), curve.excess[-1]) == (1, [0, 1], math.inf)


def test_printed_normalised_steps() -> None:
    norms = [gradient_moments(SMALL, m).second_moment(4) for m in iterates(SMALL, 0.1, 4, 2)]
    assert norms == [2.34375, printed("2.132025940"), printed("1.936203103")]
    assert iterates(SMALL, 0.1, 4, 3)[-1].tolist() == [printed("0.66289363"), printed("3.60869668")]


def iterates(problem: Problem, lr: float, batch: float, steps: int) -> list[Matrix]:
    runs = [risk_curve(problem, lr, batch, n, normalized=True).m for n in range(1, steps + 1)]
    return [problem.m0, *runs]


def test_printed_excess_of_a_power_law() -> None:
    problem = Problem.power_law(1000, 1.5, sigma2=0.01)
    assert problem.trace == printed("2.5491456029")
    curve = risk_curve(problem, 0.1 / problem.trace, steps=1000, record=[1, 10, 100, 1000])
    expected = ["1.2314076380", "0.9467009882", "0.4352328178", "0.1859454022"]
    assert curve.excess.tolist() == list(map(printed, expected))


SIX = Problem(np.arange(1, 7) ** -1.5, sigma2=0.25, delta0=np.ones(6))


def test_printed_risk_in_six_dimensions() -> None:
    curve = risk_curve(SIX, 0.1, 2, 50, record=[1, 10, 50])
    assert curve.risk.tolist() == [printed("0.934307"), printed("0.477319"), printed("0.208248")]


@pytest.mark.parametrize("normalized", [False, True])
def test_monte_carlo_agrees_within_four_standard_errors(normalized: bool) -> None:
    replicas, batch, lr, rng = 20_000, 2, 0.1, np.random.default_rng(0)
    curve = risk_curve(SIX, lr, batch, 20, normalized=normalized)
    scale = [
        gradient_moments(SIX, risk_curve(SIX, lr, batch, t, normalized=True).m if t else SIX.m0).second_moment(batch)
        for t in range(20)
    ]
    delta = np.ones((replicas, 6))
    for step in range(20):
        x = rng.standard_normal((replicas, batch, 6)) * np.sqrt(SIX.eigvals)
        residual = np.einsum("rbi,ri->rb", x, delta) - rng.standard_normal((replicas, batch)) * math.sqrt(SIX.sigma2)
        gradient = np.einsum("rbi,rb->ri", x, residual) / batch
        delta -= lr * gradient / (math.sqrt(scale[step]) if normalized else 1.0)
        if step + 1 in (1, 10, 20):
            excess = 0.5 * delta**2 @ SIX.eigvals
            assert abs(excess.mean() - curve.excess[step + 1]) < 4 * excess.std() / math.sqrt(replicas)


def covariance_step(sigma: Matrix, h: Matrix, lr: float, batch: float, noise: float) -> Matrix:
    spread = (np.trace(h @ sigma) + noise) * h
    return sigma - lr * (h @ sigma + sigma @ h) + lr**2 * ((1 + 1 / batch) * h @ sigma @ h + spread / batch)


def test_the_diagonal_is_that_of_the_full_covariance_in_any_basis() -> None:
    rng = np.random.default_rng(1)
    root = rng.standard_normal((8, 8))
    h = root @ root.T / 8
    eigvals, basis = np.linalg.eigh(h)
    delta = rng.standard_normal(8)
    problem = Problem(eigvals, 0.3, delta0=basis.T @ delta)
    sigma = np.outer(delta, delta)
    lrs, batches = rng.uniform(0, 0.15, 30), rng.uniform(1, 5, 30)
    curve = risk_curve(problem, lrs, batches)
    for step in range(30):
        assert curve.excess[step] == pytest.approx(0.5 * np.trace(h @ sigma), rel=1e-12)
        sigma = covariance_step(sigma, h, lrs[step], batches[step], 0.3)
    assert curve.m == pytest.approx(np.diag(basis.T @ sigma @ basis), rel=1e-12)
    assert curve.samples == pytest.approx([0, *np.cumsum(batches)])

    s = 3.0  # x -> s x, w -> w / s
    scaled = risk_curve(Problem(s**2 * eigvals, 0.3, delta0=basis.T @ delta / s), lrs / s**2, batches)
    assert scaled.excess == pytest.approx(curve.excess, rel=1e-12)


@pytest.mark.parametrize("normalized", [False, True])
def test_equal_and_zero_eigenvalues(normalized: bool) -> None:
    """Only the sum of m0 within an eigenspace matters, and a direction without data stays where it is."""
    eigvals = [1.0, 0.5, 0.5, 0.5, 0.0]
    even, lopsided = (
        risk_curve(Problem(eigvals, 0.2, m0=[1.0, *m0, 7.0]), 0.1, 2, 40, normalized=normalized)
        for m0 in ([1.0, 1.0, 1.0], [3.0, 0.0, 0.0])
    )
    assert even.excess == pytest.approx(lopsided.excess, rel=1e-13)
    assert even.m[1:4].sum() == pytest.approx(lopsided.m[1:4].sum(), rel=1e-13)
    assert even.m[-1] == lopsided.m[-1] == 7.0


def test_infinite_batches_are_gradient_descent() -> None:
    curve = risk_curve(SMALL, 0.3, math.inf, 12)
    assert curve.m == pytest.approx((1 - 0.3 * SMALL.eigvals) ** 24 * SMALL.m0, rel=1e-12)
    assert curve.variance_share.tolist() == [0.0] * 13


def test_sgd_schedules_of_equal_rate_over_batch_agree() -> None:
    lr = 0.04 / SPECTRUM.trace
    base = final(lr, 8, 2, 1, normalized=False)
    assert base == printed("0.0704570248")
    assert final(lr, 8, ROOT2, ROOT2, normalized=False) == printed("0.0704584204")
    assert final(lr, 8, 1, 2, normalized=False) == printed("0.0704564697")
    assert final(lr, 8, ROOT2, 2, normalized=False) / base == printed("1.1671")  # the square-root rule, on plain SGD


LINE = [(2, 1), (2**0.75, 2**0.5), (2**0.5, 2), (2**0.25, 2**1.5), (1, 4)]


def test_normalised_schedules_on_the_equivalence_line_agree_up_to_seesaw() -> None:
    excess = [final(0.1, 8, a, b) for a, b in LINE]
    assert excess == [printed(x) for x in ("0.00690862", "0.00693709", "0.00700110", "0.00723155", "0.00884936")]
    large = [final(0.3, 8, a, b) for a, b in LINE]
    assert [x / large[0] for x in large] == [1.0, *map(printed, ("1.0113", "1.0641", "1.7843", "8.3708"))]
    assert excess == sorted(excess)
    assert large == sorted(large)


@pytest.mark.parametrize(
    ("batch", "base", "seesaw", "ratio", "share"),
    [
        (8, "0.00149078", "0.00162049", "1.087", "0.8168"),
        (64, "0.00549796", "0.00706105", "1.284", "0.4877"),
        (512, "0.0329993", "0.0471774", "1.430", "0.0477"),
    ],
)
def test_past_the_critical_batch_seesaw_falls_behind(
    batch: int, base: str, seesaw: str, ratio: str, share: str
) -> None:
    first = max(8, 32768 // batch)
    constant = final(0.4, batch, 2, 1, first)
    lrs, batches = phases(0.4, batch, ROOT2, 2, 7, first)
    curve = risk_curve(SPECTRUM, lrs, batches, normalized=True, record=[len(lrs) - 1, len(lrs)])
    assert (constant, curve.excess[-1], curve.excess[-1] / constant) == (printed(base), printed(seesaw), printed(ratio))
    assert curve.variance_share[0] == printed(share)
    assert curve.variance_share[0] == pytest.approx(1 / (1 + batches[-1] / curve.critical_batch[0]), rel=1e-12)


def test_without_noise_only_a_smaller_rate_ends_the_cycle() -> None:
    line = Problem([1.0], 0.0, delta0=[1.03])
    constant = risk_curve(line, 0.1, math.inf, 200, normalized=True)
    halved = risk_curve(line, [0.1 * 2 ** -(step // 40) for step in range(200)], math.inf, normalized=True)
    assert math.sqrt(constant.m[0]) == pytest.approx(0.03, abs=1e-12)
    assert math.sqrt(halved.m[0]) == pytest.approx(0.005, abs=1e-12)


def test_the_critical_batch_grows_as_training_converges() -> None:
    curve = risk_curve(SPECTRUM, 0.1 / SPECTRUM.trace, 8, 400, record=50)
    assert (np.diff(curve.critical_batch) > 0).all()
    moments = gradient_moments(SMALL, SMALL.m0)
    assert moments.second_moment(moments.critical_batch) == pytest.approx(2 * moments.mean)


def test_a_plan_is_followed_step_by_step_with_its_rates_and_batches() -> None:
    plan = SeesawPlan.from_cosine(8192, 800, 8, kind="quarter", alpha=2.0)
    curve = predict_linear(plan, SPECTRUM, 0.1)
    assert (curve.steps[-1], curve.samples[-1]) == (plan.total_steps, 8192)
    assert np.diff(curve.samples).tolist() == [row.batch_size for row in plan.rows for _ in range(row.steps)]
    lrs = [0.1 * plan.at(int(n)).lr_factor for n in curve.samples[:-1]]
    assert curve.excess[-1] == risk_curve(SPECTRUM, lrs, np.diff(curve.samples), normalized=True).excess[-1]


def test_a_plan_predicts_seesaw_beside_the_cosine_and_a_steeper_ramp_behind() -> None:
    def excess(p: float, rule: str, lr: float) -> float:
        plan = SeesawPlan.from_cosine(2**15, 0, 8, kind="quarter", p=p, rule=rule, allow_unstable=True)
        return float(predict_linear(plan, SPECTRUM, lr, normalized=rule == "adam").excess[-1])

    cosine, seesaw, steep = (excess(p, "adam", 0.3) for p in (0.0, 1.0, 2.0))
    assert seesaw == pytest.approx(cosine, rel=0.02)
    assert steep > 1.3 * seesaw
    plain = 0.04 / SPECTRUM.trace
    assert excess(1.0, "sgd", plain) == pytest.approx(excess(0.0, "sgd", plain), rel=1e-3)


def test_schedules_may_be_numbers_arrays_or_functions_and_records_any_steps() -> None:
    lrs, batches = np.linspace(0.2, 0.1, 6), [1, 1, 2, 2, 3.5, 4]
    whole = risk_curve(SMALL, lrs, batches)
    assert risk_curve(SMALL, lambda t: lrs[t], lambda t: batches[t], 6).m.tolist() == whole.m.tolist()
    assert risk_curve(SMALL, lrs, batches, record=4).steps.tolist() == [0, 4, 6]
    some = risk_curve(SMALL, lrs, batches, record=[5, 1])
    assert some.excess.tolist() == whole.excess[[1, 5]].tolist()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("eigvals", lambda: Problem([1.0, -0.1], 0.0, m0=[1, 1])),
        ("eigvals", lambda: Problem([[1.0]], 0.0, m0=[1])),
        ("eigvals", lambda: Problem([], 0.0, m0=[])),
        ("eigvals", lambda: Problem([math.nan], 0.0, m0=[1])),
        ("sigma2", lambda: Problem([1.0], -1.0, m0=[1])),
        ("sigma2", lambda: Problem([1.0], math.nan, m0=[1])),
        ("delta0, m0", lambda: Problem([1.0], 0.0)),
        ("delta0, m0", lambda: Problem([1.0], 0.0, [1.0], m0=[1.0])),
        ("m0", lambda: Problem([1.0], 0.0, m0=[1.0, 2.0])),
        ("m0", lambda: Problem([1.0], 0.0, m0=[-1.0])),
        ("d", lambda: Problem.power_law(0, 1.0, 0.0)),
        ("lr", lambda: risk_curve(SMALL, -0.1, steps=1)),
        ("lr", lambda: risk_curve(SMALL, [0.1, math.nan])),
        ("batch", lambda: risk_curve(SMALL, 0.1, 0.5, 1)),
        ("steps", lambda: risk_curve(SMALL, 0.1)),
        ("steps", lambda: risk_curve(SMALL, [0.1, 0.1], [1, 1, 1])),
        ("steps", lambda: risk_curve(SMALL, 0.1, steps=0)),
        ("record", lambda: risk_curve(SMALL, 0.1, steps=2, record=[3])),
        ("record", lambda: risk_curve(SMALL, 0.1, steps=2, record="last")),
        ("record", lambda: risk_curve(SMALL, 0.1, steps=2, record=0)),
    ],
)
def test_wrong_input_is_named(name: str, wrong: Callable[[], object]) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: got"):
        wrong()
