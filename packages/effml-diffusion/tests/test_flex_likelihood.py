from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from effml_diffusion.flex import FlexMDM
from effml_diffusion.flex.interpolant import gauss_legendre
from effml_shared.errors import ConfigError

Law = dict[tuple[int, ...], float]


def make(model: Any, law: Law, **options: Any) -> FlexMDM:
    longest = max(1, *map(len, law))
    return FlexMDM(model, model.mask_id, model.pad_id, longest, length_multiple=1, **options)


def enumerated(flex: FlexMDM, law: Law, nodes: int = 64) -> dict[str, float]:
    """The parts of the loss averaged over a law, by loops over states and a quadrature of its own."""
    v, w = gauss_legendre(nodes)
    t, w = 1 - (1 - v) ** 3, w * 3 * (1 - v) ** 2
    chance = flex.interpolant.state_probabilities(t)
    rates = flex.interpolant.unmask.rate(t), flex.interpolant.insert.rate(t)
    parts = {"unmask": 0.0, "tight": 0.0, "phi": 0.0}
    for x, p in law.items():
        texts = flex.texts([x]).take(torch.zeros(nodes, dtype=torch.int64))
        for kinds in itertools.product(range(3), repeat=len(x)):
            kind = torch.tensor(kinds, dtype=torch.int64).expand(nodes, -1)
            terms = flex.terms(flex.observe(texts, kind > 0, kind == 1, t))
            weight = p * w * math.prod((chance[:, k] for k in kinds), start=torch.ones(nodes))
            parts["unmask"] += float((weight * rates[0] * terms.cross_entropy.sum(1)).sum())
            parts["tight"] += float((weight * rates[1] * terms.insertion_nll).sum())
            parts["phi"] += float((weight * rates[1] * terms.insertion).sum())
    return parts


def test_the_bound_is_tight_and_phi_is_not(flex_law: Law, exact_flex_posterior: Callable[..., Any]) -> None:
    model = exact_flex_posterior(flex_law, 2)
    parts = enumerated(make(model, flex_law), flex_law)
    assert parts["unmask"] == pytest.approx(0.554515, abs=1e-5)
    assert parts["tight"] == pytest.approx(0.950268, abs=1e-5)
    assert parts["phi"] == pytest.approx(1.695740, abs=1e-5)
    assert model.entropy == pytest.approx(1.504788, abs=1e-6)
    assert parts["unmask"] + parts["tight"] == pytest.approx(model.entropy, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "unmask", "tight", "phi"),
    [((0, 1), 0.346574, -0.346574, math.log(2) - 0.346574), ((0, 0, 0, 0), 0.0, 0.0, 2.513223)],
)
def test_a_certain_text_costs_nothing(
    text: tuple[int, ...], unmask: float, tight: float, phi: float, exact_flex_posterior: Callable[..., Any]
) -> None:
    law = {text: 1.0}
    parts = enumerated(make(exact_flex_posterior(law, max(text) + 1), law), law)
    assert parts == pytest.approx({"unmask": unmask, "tight": tight, "phi": phi}, abs=2e-5)


@pytest.mark.parametrize(
    ("insert", "unmask"),
    [("linear", "linear"), ("cosine", "linear"), ("linear", "polynomial(2)"), ("cosine_dllm", "polynomial_mask(2)")],
)
def test_the_exact_bound_averages_to_the_entropy_under_every_schedule(
    insert: str, unmask: str, flex_law: Law, exact_flex_posterior: Callable[..., Any]
) -> None:
    model = exact_flex_posterior(flex_law, 2)
    bound = make(model, flex_law, insert=insert, unmask=unmask).exact_nelbo(list(flex_law))
    mean = float(bound.nats @ torch.tensor(list(flex_law.values()), dtype=torch.float64))
    assert mean == pytest.approx(model.entropy, abs=2e-6)
    torch.testing.assert_close(bound.unmask + bound.insert, bound.nats)
    assert bound.n_tokens.tolist() == [0, 1, 2, 2, 3]
    assert bound.perplexity == pytest.approx(math.exp(float(bound.nats.sum()) / 8))


def test_the_estimate_agrees_with_the_exact_bound_within_its_error(
    flex_law: Law, exact_flex_posterior: Callable[..., Any]
) -> None:
    flex = make(exact_flex_posterior(flex_law, 2), flex_law)
    exact = flex.exact_nelbo(list(flex_law))
    generator = torch.Generator().manual_seed(0)
    found = flex.nelbo(list(flex_law), n_mc=4096, groups=32, batch_size=4096, generator=generator)
    for part in ("nats", "unmask", "insert"):
        assert bool(((getattr(found, part) - getattr(exact, part)).abs() < 4 * found.stderr + 1e-6).all())
    assert bool((found.stderr < 0.1).all())
    assert bool((found.stderr[1:] > 1e-5).all())
    assert flex.nelbo([[0]], n_mc=4, groups=1).stderr.isnan().all()


def test_given_tokens_cost_nothing_and_closed_junctions_neither(exact_flex_posterior: Callable[..., Any]) -> None:
    law = {(0,): 0.5, (0, 1): 0.25, (0, 0): 0.25}
    flex = make(exact_flex_posterior(law, 2), law)
    x, fixed = [[0], [0, 1], [0, 0]], [[True], [True, False], [True, False]]
    closed = torch.tensor([[True, False, False]] * 3)
    bound = flex.exact_nelbo(x, fixed=fixed, closed=closed)
    # a network that is not told what is given thinks of "a" as any deletion of the text, so it is no tight bound
    assert bound.n_tokens.tolist() == [0, 1, 1]
    free = flex.exact_nelbo(x, fixed=fixed)
    assert bool((bound.insert < free.insert).all())
    everything = flex.exact_nelbo([[0, 1]], fixed=[[True, True]], closed=torch.ones(1, 3, dtype=torch.bool))
    assert (float(everything.nats), everything.perplexity) == (0.0, 1.0)
    estimate = flex.nelbo(x, fixed=fixed, closed=closed, n_mc=2048, generator=torch.Generator().manual_seed(1))
    assert bool(((estimate.nats - bound.nats).abs() < 5 * estimate.stderr + 1e-9).all())


def test_wrong_arguments(flex_law: Law, exact_flex_posterior: Callable[..., Any]) -> None:
    model = exact_flex_posterior(flex_law, 2)
    flex = make(model, flex_law)
    with pytest.raises(ConfigError, match=r"n_mc: got 12, expected a multiple of groups = 8"):
        flex.nelbo([[0]], n_mc=12)
    with pytest.raises(ConfigError, match=r"groups: got 0"):
        flex.nelbo([[0]], groups=0)
    with pytest.raises(ConfigError, match=r"t_end: got 1.0"):
        flex.nelbo([[0]], t_end=1.0)
    with pytest.raises(ConfigError, match=r"insert: got Geometric.* expected a schedule from 0 to 1"):
        make(model, flex_law, insert="geometric(0.01, 10)").nelbo([[0]])
    with pytest.raises(ConfigError, match=r"unmask: got PolynomialMask.* expected a schedule from 0 to 1"):
        make(model, flex_law, unmask="loglinear(1e-3)").exact_nelbo([[0]])
    with pytest.raises(ConfigError, match=r"x: got 9 tokens that are not given, expected at most 8"):
        FlexMDM(model, 2, 3, 9).exact_nelbo([[0] * 9])
