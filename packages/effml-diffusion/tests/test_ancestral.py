"""Ancestral sampling: its law, the number of forward passes, and a step-by-step sampler without any planning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_diffusion.samplers import Ancestral
from effml_shared.errors import ConfigError
from effml_shared.generation import draw
from torch import Tensor

VOCAB = 4
TABLE = torch.randn(2, VOCAB + 1, VOCAB + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def neighbours(ids: Tensor, t: Tensor | None = None) -> Tensor:
    """Logits that depend on both neighbours and, if told, on the time."""
    logits = TABLE[0][ids].roll(1, 1) + TABLE[1][ids].roll(-1, 1)
    return logits if t is None else logits * (1 + t.double()[:, None, None])


def distance(ids: Tensor, law: Mapping[tuple[int, ...], float]) -> float:
    """Total variation between the samples' frequencies and a law."""
    found = Counter(map(tuple, ids.tolist()))
    return 0.5 * sum(abs(found[x] / len(ids) - law.get(x, 0.0)) for x in {*found, *law})


def test_the_law_of_an_exact_model(
    reference_law: dict[tuple[int, ...], float], exact_posterior: Callable[..., Any]
) -> None:
    model = exact_posterior(reference_law)
    init = torch.full((50_000, 3), model.mask_id)
    output = Ancestral(steps=4096)(
        MaskedDiffusion(model, model.mask_id), init, generator=torch.Generator().manual_seed(0)
    )
    assert distance(output.ids, reference_law) < 0.02
    assert output.n_forwards == model.calls <= 4


def by_steps(diffusion: MaskedDiffusion, init: Tensor, steps: int, eps: float) -> tuple[Tensor, int]:
    """Run the network in every step of every row, and reveal where the position's number says so."""
    generator = torch.Generator().manual_seed(5)
    level, number = (torch.rand(init.shape, dtype=torch.float64, generator=generator) for _ in range(2))
    times = torch.linspace(1, eps, steps + 1, dtype=torch.float64)
    ids, most = init.clone(), 0
    for row in range(len(ids)):
        changes = 0
        for t, s in pairwise(times):
            told = None if diffusion.time_conditioning == "none" else t[None]
            logits = diffusion.logits(ids[row : row + 1], t=told)[0, :, :VOCAB]
            clean = level[row] >= diffusion.schedule.mask_level(s) / diffusion.schedule.mask_level(times[0])
            now = (ids[row] == VOCAB) & clean
            ids[row, now] = draw(logits[now], number[row, now])
            changes += bool(now.any())
        most = max(most, changes)
    return ids, most


@pytest.mark.parametrize("time_conditioning", ["none", "time"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "geometric(1e-4, 3)"])
@pytest.mark.parametrize("steps", [3, 40])
def test_planning_changes_nothing_but_the_cost(time_conditioning: str, schedule: str, steps: int) -> None:
    diffusion = MaskedDiffusion(neighbours, VOCAB, schedule=schedule, time_conditioning=time_conditioning)
    init = torch.full((6, 9), VOCAB)
    init[1, ::2] = 1
    init[2] = 3  # a row without masks
    expected, most = by_steps(diffusion, init, steps, 0.0)
    output = Ancestral(steps, eps=0.0, final="sample")(diffusion, init, generator=torch.Generator().manual_seed(5))
    left = expected == VOCAB  # geometric schedules end above 0
    assert torch.equal(output.ids[~left], expected[~left])
    assert output.n_forwards == most + bool(left.any())


def test_fine_grids_cost_no_more_than_the_sequence_is_long() -> None:
    output = Ancestral(steps=1000)(MaskedDiffusion(neighbours, VOCAB), torch.full((64, 16), VOCAB))
    assert output.n_forwards <= 16 + 1


def test_what_the_grid_leaves_is_the_likeliest_or_drawn() -> None:
    diffusion, init = MaskedDiffusion(neighbours, VOCAB), torch.full((1, 4), VOCAB)
    seeds = list(range(400))
    many = init.expand(400, 4)
    sampler = {final: Ancestral(steps=1, eps=0.999999, final=final) for final in ("argmax", "sample")}
    likeliest = neighbours(init)[..., :VOCAB].argmax(-1)
    argmax = sampler["argmax"](diffusion, many, seeds=seeds)
    assert torch.equal(argmax.ids, likeliest.expand(400, 4))
    assert argmax.n_forwards == 1
    sample = sampler["sample"](diffusion, many, seeds=seeds).ids
    for position, law in enumerate(neighbours(init)[0, :, :VOCAB].softmax(-1)):
        assert bool((sample[:, position].bincount(minlength=VOCAB) / 400 - law).abs().max() < 0.1)


def test_bad_arguments_are_refused() -> None:
    for options, message in (
        ({"steps": 0}, r"steps: got 0"),
        ({"final": "mode"}, r"final: got 'mode'"),
        ({"eps": 1.0}, r"eps: got 1.0, expected a time in \[0, 1\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            Ancestral(**options)
