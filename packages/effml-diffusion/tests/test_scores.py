"""Scores against their definitions on probabilities."""

import pytest
import torch
from effml_diffusion.samplers.scores import SCORES, margin, neg_entropy, top_prob


def test_values_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64).log() + 5
    assert margin(logits).tolist() == pytest.approx([0.2, 1.0])
    assert top_prob(logits).tolist() == pytest.approx([0.5, 1.0])
    assert neg_entropy(logits).tolist() == pytest.approx([-1.0296530140645737, 0.0])


@pytest.mark.parametrize("name", SCORES)
def test_scores_ignore_a_constant_and_keep_their_type(name: str) -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    score = SCORES[name](logits)
    assert score.shape == (4,)
    torch.testing.assert_close(SCORES[name](logits + 300), score)
    assert SCORES[name](logits.float()).dtype == torch.float32


def test_a_vocabulary_of_one() -> None:
    assert margin(torch.zeros(2, 1)).tolist() == [1.0, 1.0]
    assert margin(torch.zeros(0, 5)).tolist() == []
