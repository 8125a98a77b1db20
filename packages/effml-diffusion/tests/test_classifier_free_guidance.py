"""Guidance: the formula, impossible tokens, and one pass of twice the rows against two passes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from effml_diffusion import samplers
from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_diffusion.samplers.classifier_free_guidance import guided_logits
from torch import Tensor

MASK = 5
TABLE = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Neighbours:
    """Logits that depend on both neighbours; remembers what it was called with."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        self.seen.append(ids)
        return TABLE[ids].roll(1, 1) + 0.5 * TABLE.T[ids].roll(-1, 1)


def test_formula_and_impossible_tokens() -> None:
    c, u = torch.tensor([1.0, -math.inf, 3.0]), torch.tensor([0.0, -math.inf, 3.0])
    assert guided_logits(c, u, 2.0).tolist() == [3.0, -math.inf, 3.0]
    assert guided_logits(c, u, -1.0).tolist() == [0.0, -math.inf, 3.0]


@pytest.mark.parametrize("score", ["margin", "random", "prob"])
def test_one_pass_or_two(score: str) -> None:
    init = torch.tensor([[1, MASK, MASK, 2, MASK, MASK], [MASK, 3, MASK, MASK, MASK, 0]])
    found = []
    for batched in (True, False):
        model = Neighbours()
        options: dict[str, Any] = {"guidance": 1.5, "guidance_batched": batched, "steps": 4, "score": score}
        output = samplers.Confidence(**options)(MaskedDiffusion(model, MASK), init, seeds=[1, 2])
        assert output.n_forwards == 8
        assert len(model.seen) == (4 if batched else 8)
        found.append(output.ids)
    assert torch.equal(*found)


def test_first_step_by_hand_and_the_condition_is_what_is_fixed() -> None:
    init = torch.tensor([[1, MASK, MASK, 2]])
    model = Neighbours()
    output = samplers.Confidence(steps=1, temperature=0, guidance=2.0)(MaskedDiffusion(model, MASK), init)
    assert model.seen[0].tolist() == [[1, MASK, MASK, 2], [MASK] * 4]
    c, u = Neighbours()(model.seen[0])
    guided = (u + 3 * (c - u))[:, :MASK]
    assert output.ids.tolist() == [[1, int(guided[1].argmax()), int(guided[2].argmax()), 2]]


def test_padding_is_no_condition() -> None:
    model = Neighbours()
    diffusion = MaskedDiffusion(model, MASK, pad_id=0)
    samplers.Confidence(steps=1, guidance=1.0)(diffusion, torch.tensor([[1, MASK, 0]]))
    assert model.seen[0].tolist() == [[1, MASK, 0], [MASK, MASK, 0]]
    model = Neighbours()
    attention_mask = torch.tensor([[1, 1, 0]])
    sampler = samplers.Confidence(steps=1, guidance=1.0)
    sampler(MaskedDiffusion(model, MASK), torch.tensor([[1, MASK, 2]]), attention_mask=attention_mask)
    assert model.seen[0].tolist() == [[1, MASK, 2], [MASK, MASK, 2]]


def test_no_weight_no_second_pass() -> None:
    model = Neighbours()
    output = samplers.Confidence(steps=2)(MaskedDiffusion(model, MASK), torch.full((1, 4), MASK))
    assert (output.n_forwards, len(model.seen), len(model.seen[0])) == (2, 2, 1)
