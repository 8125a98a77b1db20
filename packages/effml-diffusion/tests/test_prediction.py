"""Reading logits in pieces, and drawing from them."""

from __future__ import annotations

import math

import pytest
import torch
from effml_diffusion.samplers import prediction as module
from effml_diffusion.samplers.prediction import Prediction, draw_tokens
from torch import Tensor


def logits_of(rows: int, vocab: int) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("piece", [1, 12, 2**20])
def test_pieces_change_nothing(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.PIECE, "cpu", piece)
    logits, index = logits_of(7, 5), torch.arange(10, 17)
    prediction = Prediction(index, logits.clone(), [3])
    shift = torch.arange(7.0)
    sums, first = prediction.map(lambda x, y: (x.exp().sum(-1) + y, x[:, :2]), shift)
    kept = logits.index_fill(1, torch.tensor([3]), -math.inf)
    torch.testing.assert_close(sums, kept.exp().sum(-1) + shift)
    assert torch.equal(first, logits[:, :2])
    rows = torch.tensor([6, 0])
    (some,) = prediction.map(lambda x, y: (x[:, 4] + y,), shift[rows], rows=rows)
    torch.testing.assert_close(some, logits[rows, 4] + shift[rows])
    (none,) = prediction.map(lambda x: (x.sum(-1),), rows=rows[:0])
    assert none.shape == (0,)


def test_reading_widens_and_tolerates_heads_without_a_mask() -> None:
    prediction = Prediction(torch.arange(2), logits_of(2, 5).bfloat16(), [5, 9])
    assert prediction.at(slice(None)).dtype == torch.float32
    assert bool(prediction.at(slice(None)).isfinite().all())
    assert Prediction(torch.arange(2), logits_of(2, 5).double(), []).at(slice(0, 1)).dtype == torch.float64


def test_guidance_is_applied_where_it_is_read() -> None:
    conditional, unconditional = logits_of(4, 5), torch.ones(4, 5)
    prediction = Prediction(torch.arange(4), conditional.clone(), [0], unconditional, 0.5)
    expected = unconditional + 1.5 * (conditional - unconditional)
    expected[:, 0] = -math.inf
    torch.testing.assert_close(prediction.at(torch.tensor([2, 1])), expected[[2, 1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_draws_follow_the_tempered_law(dtype: torch.dtype) -> None:
    n = 200_000
    logits = torch.tensor([0.0, 1.0, 2.0], dtype=dtype).expand(n, 3)
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    counts = draw_tokens(logits, uniform, temperature=0.5).bincount(minlength=3) / n
    law = torch.softmax(2 * torch.arange(3.0), -1)
    assert bool(((counts - law).abs() < 4 * (law * (1 - law) / n).sqrt()).all())


def test_cold_draws_are_the_argmax() -> None:
    logits = logits_of(50, 9)
    uniform = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for temperature in (0.0, 1e-9, 1e-45):
        assert torch.equal(draw_tokens(logits, uniform, temperature=temperature), logits.argmax(-1))


def test_rare_tokens_are_drawn_as_rarely_as_they_should() -> None:
    # Float32 noise is a multiple of 2^-24 and would never tell these two numbers apart.
    logits = torch.tensor([[0.0, math.log(2.0**-30)]]).expand(2, 2)
    uniform = torch.tensor([1 - 2.0**-29, 1 - 2.0**-31], dtype=torch.float64)
    assert draw_tokens(logits, uniform).tolist() == [0, 1]


def test_nucleus_keeps_the_token_that_crosses() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(1000, 4)
    uniform = torch.linspace(0, 1 - 1e-9, 1000, dtype=torch.float64)
    assert draw_tokens(logits, uniform, top_p=0.6).unique().tolist() == [0, 1]
    assert draw_tokens(logits, uniform, top_p=1e-6).unique().tolist() == [0]
    assert draw_tokens(logits, uniform, top_k=3).unique().tolist() == [0, 1, 2]
