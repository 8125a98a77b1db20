"""ReMDM: transition probabilities by hand, the shares of clean tokens it promises, and laws it keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_diffusion.samplers import Decoding, ReMDM
from effml_diffusion.samplers.remdm import largest_sigma, reveal_probability
from effml_diffusion.schedules import schedule
from effml_shared.errors import ConfigError
from torch import Tensor

MASK = 4
TABLE = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def neighbours(ids: Tensor) -> Tensor:
    return TABLE[0][ids].roll(1, 1) + TABLE[1][ids].roll(-1, 1)


def test_transition_by_hand() -> None:
    assert largest_sigma(0.5, 0.6) == pytest.approx(0.8)
    assert largest_sigma(0.0, 0.1) == 1.0
    reveal = reveal_probability(0.5, 0.6, 0.2)
    assert reveal == pytest.approx(0.4)
    assert 0.5 * (1 - 0.2) + 0.5 * reveal == pytest.approx(0.6)
    assert reveal_probability(0.5, 0.6, 0.0) == pytest.approx(schedule("linear").hazard(0.5, 0.4))
    for sigma in (0.81, -0.1):
        with pytest.raises(ConfigError, match=r"sigma: got .* expected a probability of at most 0.8"):
            reveal_probability(0.5, 0.6, sigma)


@pytest.mark.parametrize(("strategy", "eta"), [("cap", 0.1), ("rescale", 0.3), ("loop", 0.05)])
def test_the_share_of_clean_tokens_is_the_schedules(strategy: str, eta: float) -> None:
    sampler = ReMDM(steps=20, strategy=strategy, eta=eta, eps=0.0)
    shares, remasked, before = [], [0], torch.ones(500, 40, dtype=torch.bool)

    def callback(step: int, state: Decoding) -> None:
        shares.append(float(state.committed.double().mean()))
        remasked.append(int((state.masked & ~before).sum()))
        before.copy_(state.masked)

    diffusion, init = MaskedDiffusion(neighbours, MASK), torch.full((500, 40), MASK)
    output = sampler(diffusion, init, generator=torch.Generator().manual_seed(0), callback=callback)
    expected = [sampler.clean_share(diffusion.schedule, 1 - (k + 1) / 20) for k in range(20)]
    assert shares[:20] == pytest.approx(expected, abs=0.02)
    assert sum(remasked) > 1000
    assert not bool((output.ids == MASK).any())


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        # A large constant eta has errors that no number of steps removes: it often reveals two tokens at once.
        ({"eta": 0.0}, 0.02),
        ({"eta": 0.02}, 0.02),
        ({"strategy": "rescale", "eta": 0.02}, 0.02),
        ({"strategy": "conf"}, 0.05),
    ],
)
def test_laws_of_an_exact_model(
    options: dict[str, Any],
    tolerance: float,
    reference_law: dict[tuple[int, ...], float],
    exact_posterior: Callable[..., Any],
) -> None:
    model = exact_posterior(reference_law)
    init = torch.full((20_000, 3), model.mask_id)
    sampler = ReMDM(steps=80, **options)
    output = sampler(MaskedDiffusion(model, model.mask_id), init, generator=torch.Generator().manual_seed(0))
    found = Counter(map(tuple, output.ids.tolist()))
    assert 0.5 * sum(abs(found[x] / len(init) - p) for x, p in reference_law.items()) < tolerance


def test_the_loop_holds_its_share() -> None:
    sampler = ReMDM(strategy="loop")
    share = [sampler.clean_share(schedule("cosine"), t) for t in (1.0, 0.775, 0.55, 0.3, 0.05, 0.025, 0.0)]
    assert share == pytest.approx([0.0, 0.45, 0.9, 0.9, 0.9, 0.95, 1.0])
    assert [sampler.sigma(0.9, 0.9, t) for t in (0.6, 0.55, 0.06, 0.05)] == [0.0, 0.02, 0.02, 0.0]


def test_given_tokens_and_rows_without_masks_are_left_alone() -> None:
    init = torch.full((4, 30), MASK)
    init[:, ::3], init[3] = 1, 2
    for strategy in ("cap", "rescale", "conf", "loop"):
        eta = None if strategy == "conf" else 0.5
        output = ReMDM(40, strategy, eta, history=True)(MaskedDiffusion(neighbours, MASK), init, seeds=[1, 2, 3, 4])
        assert output.history is not None
        assert bool((output.history[:, init != MASK] == init[init != MASK]).all())
        assert not bool((output.ids == MASK).any())


def test_conf_masks_by_the_softmax_of_what_was_unlikely() -> None:
    rows, steps = 4000, 10
    logits = torch.zeros(10, 5, dtype=torch.float64)
    logits[:5, 0] = 5.7  # 0 with probability 0.99 in the left half, any of four in the right
    probs = logits[:, :4].softmax(-1)
    ids = torch.full((rows, 10), MASK)
    expected, found = torch.zeros(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)

    def callback(step: int, state: Decoding) -> None:
        committed = ids != MASK
        if step < steps and bool(committed.any()):
            had = probs.expand(rows, 10, 4).gather(2, ids.where(committed, 0)[..., None]).squeeze(-1)
            weight = (-had).masked_fill(~committed, -torch.inf).softmax(1).nan_to_num(0.0)
            expected.add_(weight.sum(0) * largest_sigma(step / steps, (step + 1) / steps))
            found.add_((state.masked & committed).sum(0))
        ids.copy_(state.ids)

    def model(ids: Tensor) -> Tensor:
        return logits.expand(*ids.shape, 5)

    sampler = ReMDM(steps, "conf", eps=0.0)
    sampler(MaskedDiffusion(model, MASK), ids, generator=torch.Generator().manual_seed(0), callback=callback)
    assert bool(((found - expected).abs() < 5 * expected.sqrt()).all())
    assert float(expected[5:].sum() / expected[:5].sum()) > 1.15


def test_bad_arguments_are_refused() -> None:
    bad: list[tuple[dict[str, Any], str]] = [
        ({"steps": 0}, r"steps: got 0"),
        ({"strategy": "swap"}, r"strategy: got 'swap'"),
        ({"eta": 1.5}, r"eta: got 1.5, expected a probability"),
        ({"strategy": "conf", "eta": 0.1}, r"eta: got 0.1, expected none with strategy 'conf'"),
        ({"final": "none"}, r"final: got 'none'"),
        ({"eps": -0.1}, r"eps: got -0.1"),
        ({"t_on": 0.01}, r"t_on: got t_off=0.05, t_on=0.01"),
    ]
    for options, message in bad:
        with pytest.raises(ConfigError, match=message):
            ReMDM(**options)
