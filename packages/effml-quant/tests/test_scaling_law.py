import numpy as np
import pytest
from effml_quant.instability.scaling_law import NAMES, ScalingLaw, _chinchilla, _kaplan, fit_scaling_law
from effml_shared.errors import ConfigError

LAWS = [
    ScalingLaw("chinchilla", A=2822, B=20445, E=0.535, alpha=0.524, beta=0.553, loss=0.0),  # E4M3 weights, bf16 inputs
    ScalingLaw("chinchilla", A=406.4, B=410.7, E=1.69, alpha=0.34, beta=0.28, loss=0.0),
    ScalingLaw("kaplan", A=8.8e13, B=5.4e13, E=0.5, alpha=0.076, beta=0.095, loss=0.0),
]


def models(count=60, seed=0):
    rng = np.random.default_rng(seed)
    n = 10 ** rng.uniform(7, 9.3, count)
    return n, n * 10 ** rng.uniform(0.3, 2.3, count)  # 2 < D / N < 200


@pytest.mark.parametrize("law", LAWS)
def test_noiseless_points_give_the_law_back(law):
    n, d = models()
    fit = fit_scaling_law(n, d, law.predict(n, d), form=law.form, starts=12)
    assert all(getattr(fit, name) == pytest.approx(getattr(law, name), rel=1e-5) for name in NAMES)
    assert fit.optimal == pytest.approx(law.optimal, rel=1e-5)


def test_the_published_exponent():
    assert LAWS[0].optimal == pytest.approx(0.514, abs=1e-3)


@pytest.mark.parametrize("law", LAWS)
def test_the_exponent_is_that_of_the_optimum_on_a_budget(law):
    floorless = ScalingLaw(law.form, law.A, law.B, 0.0, law.alpha, law.beta, 0.0)
    log_n = np.linspace(np.log(1e4), np.log(1e14), 400_001)
    best = []
    for flops in (1e19, 1e22):
        n = np.exp(log_n)
        best.append(log_n[np.argmin(floorless.predict(n, flops / (6 * n)))])
    assert (best[1] - best[0]) / np.log(1e3) == pytest.approx(law.optimal, abs=1e-3)


@pytest.mark.parametrize("terms", [_chinchilla, _kaplan])
def test_the_gradient_is_that_of_finite_differences(terms):
    n, d = (np.log(x) for x in models(10))
    theta = np.array([8.0, 9.0, -0.5, 0.4, 0.3])
    step = 1e-6
    numeric = [(terms(theta + step * e, n, d)[0] - terms(theta - step * e, n, d)[0]) / (2 * step) for e in np.eye(5)]
    np.testing.assert_allclose(terms(theta, n, d)[1], np.stack(numeric, -1), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("law", [LAWS[0], LAWS[2]])
def test_log_l_is_the_log_of_the_prediction(law):
    n, d = models(10)
    theta = np.array([np.log(law.A), np.log(law.B), np.log(law.E), law.alpha, law.beta])
    terms = _chinchilla if law.form == "chinchilla" else _kaplan
    np.testing.assert_allclose(terms(theta, np.log(n), np.log(d))[0], np.log(law.predict(n, d)))


def test_an_outlier_hardly_moves_the_fit_and_intervals_hold_the_truth():
    law, rng = LAWS[0], np.random.default_rng(3)
    n, d = models()
    losses = law.predict(n, d) * np.exp(2e-3 * rng.standard_normal(60))
    losses[7] *= 1.5  # a run that spiked
    fit = fit_scaling_law(n, d, losses, starts=8, bootstrap=40)
    assert fit.optimal == pytest.approx(law.optimal, abs=0.02)
    assert set(fit.intervals) == {*NAMES, "optimal"}
    assert all(fit.intervals[name][0] <= fit.intervals[name][1] for name in fit.intervals)
    low, high = fit.intervals["optimal"]
    assert low <= fit.optimal <= high
    assert high - low < 0.1
    again = fit_scaling_law(n, d, losses, starts=8, bootstrap=40)
    assert again == fit


def test_what_cannot_be_fitted_is_refused():
    n, d = models(8)
    losses = LAWS[0].predict(n, d)
    with pytest.raises(ConfigError, match="form: got 'cubic'"):
        fit_scaling_law(n, d, losses, form="cubic")
    with pytest.raises(ConfigError, match="losses: got 5, 5, 5 numbers"):
        fit_scaling_law(n[:5], d[:5], losses[:5])
    with pytest.raises(ConfigError, match="losses: got 8, 8, 7"):
        fit_scaling_law(n, d, losses[:7])
    for bad in (np.nan, 0.0, np.inf):
        with pytest.raises(ConfigError, match="tokens: got"):
            fit_scaling_law(n, [*d[:7], bad], losses)
    with pytest.raises(ConfigError, match="starts: got 0"):
        fit_scaling_law(n, d, losses, starts=0)
