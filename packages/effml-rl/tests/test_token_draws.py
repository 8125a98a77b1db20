"""Draws: the distribution they follow, what filters leave alone, greedy rows, and numbers that are none."""

from __future__ import annotations

import pytest
import torch
from effml_rl.token_draws import draw_tokens
from effml_shared.generation import filter_logits
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

LOGITS = torch.randn(1, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("filters", [{}, {"top_k": 7, "top_p": 0.9, "min_p": 0.03}])
def test_they_follow_the_filtered_distribution_and_report_the_whole_one(filters: dict[str, float]) -> None:
    rows = 100_000
    uniform = torch.rand(rows, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids, logps = draw_tokens(LOGITS.expand(rows, -1), torch.full((rows,), 1.3), uniform, **filters)  # type: ignore[arg-type]
    probs = filter_logits(LOGITS, temperature=1.3, **filters)[0].softmax(0)  # type: ignore[arg-type]
    counts, kept = ids.bincount(minlength=12), probs > 0
    assert not counts[~kept].any()
    assert chisquare(counts[kept].numpy(), (probs[kept] * rows).numpy()).pvalue > 1e-3
    torch.testing.assert_close(logps, (LOGITS[0] / 1.3).log_softmax(0)[ids], rtol=0, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 300), st.floats(0, 1 - 2**-52), st.floats(0.01, 100))
def test_no_number_draws_an_impossible_token(seed: int, vocab: int, uniform: float, temperature: float) -> None:
    logits = 30 * torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed))
    logits[:, vocab // 2 + 1 :] = -torch.inf
    ids, logps = draw_tokens(logits, torch.full((3,), temperature), torch.full((3,), uniform, dtype=torch.float64))
    assert ids.max() <= vocab // 2
    assert logps.isfinite().all()


def test_a_row_does_not_depend_on_the_others_or_their_temperature() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, uniform = torch.randn(64, 700, generator=generator), torch.rand(64, generator=generator).double()
    temperature = torch.tensor([0.0, 0.5, 1.0, 2.0]).repeat(16)
    ids, logps = draw_tokens(logits, temperature, uniform)
    for row in range(8):
        alone = draw_tokens(logits[row : row + 1], temperature[row : row + 1], uniform[row : row + 1])
        assert torch.equal(
            torch.stack([alone[0].float(), alone[1]]), torch.stack([ids.float(), logps])[:, row : row + 1]
        )
    assert torch.equal(ids[::4], logits[::4].argmax(-1))
    assert not logps[::4].any()


def test_half_precision_is_widened_and_nan_is_reported() -> None:
    one, half = torch.ones(1), torch.full((1,), 0.5, dtype=torch.float64)
    logits = LOGITS.bfloat16()
    ids, logps = draw_tokens(logits, one, half)
    assert logps.dtype == torch.float32
    assert torch.equal(ids, draw_tokens(logits.float(), one, half)[0])
    for temperature in (one, 0 * one):
        broken = LOGITS.float().clone()
        broken[0, 3] = torch.nan
        ids, logps = draw_tokens(broken, temperature, half)
        assert 0 <= ids.item() < 12
        assert logps.isnan().all()
