"""First-hitting sampling: its law, its times, and ancestral sampling on an ever finer grid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_diffusion.samplers import Ancestral, FirstHitting
from torch import Tensor

MASK = 4
TABLE = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def neighbours(ids: Tensor) -> Tensor:
    return TABLE[0][ids].roll(1, 1) + TABLE[1][ids].roll(-1, 1)


def test_the_law_of_an_exact_model(
    reference_law: dict[tuple[int, ...], float], exact_posterior: Callable[..., Any]
) -> None:
    model = exact_posterior(reference_law)
    init = torch.full((50_000, 3), model.mask_id)
    output = FirstHitting()(MaskedDiffusion(model, model.mask_id), init, generator=torch.Generator().manual_seed(0))
    found = Counter(map(tuple, output.ids.tolist()))
    assert 0.5 * sum(abs(found[x] / 50_000 - p) for x, p in reference_law.items()) < 0.02
    assert output.n_forwards == model.calls == 3


def test_it_is_the_limit_of_ancestral_sampling() -> None:
    init = torch.full((8, 12), MASK)
    init[:4, ::3] = 2
    diffusion = MaskedDiffusion(neighbours, MASK)
    exact = FirstHitting()(diffusion, init, generator=torch.Generator().manual_seed(3))
    fine = Ancestral(steps=10**6, eps=0.0)(diffusion, init, generator=torch.Generator().manual_seed(3))
    assert torch.equal(exact.ids, fine.ids)
    assert exact.n_forwards == fine.n_forwards == 12


def test_the_network_is_told_the_times_of_the_process() -> None:
    times: list[Tensor] = []

    def model(ids: Tensor, t: Tensor) -> Tensor:
        times.append(t)
        return torch.zeros(*ids.shape, 5)

    rows, length = 4000, 5
    for name in ("linear", "cosine", "geometric(1e-4, 3)"):
        times.clear()
        diffusion = MaskedDiffusion(model, MASK, schedule=name, time_conditioning="time")
        FirstHitting()(diffusion, torch.full((rows, length), MASK), generator=torch.Generator().manual_seed(0))
        told = torch.stack(times, 1)
        assert bool((told.diff(dim=1) <= 0).all())
        # The largest of n uniform numbers averages n / (n + 1), and so on down.
        level = (diffusion.schedule.mask_level(told) / diffusion.schedule.mask_level(1.0)).mean(0)
        expected = torch.arange(length, 0, -1) / (length + 1)
        assert float((level - expected).abs().max()) < 0.02


def test_every_pass_reveals_one_token_of_every_row_that_has_one() -> None:
    init = torch.tensor([[MASK] * 3, [1, MASK, 2]])
    output = FirstHitting(history=True)(MaskedDiffusion(neighbours, MASK), init)
    assert output.history is not None
    assert (output.history == MASK).sum(-1).tolist() == [[3, 1], [2, 0], [1, 0], [0, 0]]
