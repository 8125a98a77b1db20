from __future__ import annotations

import math

import pytest
import torch
from effml_eval.scoring import token_scores
from effml_eval.scoring.token_scores import score_tokens
from effml_shared.errors import ConfigError, NonFiniteError
from torch import Tensor


def score(logits: Tensor, targets: list[int]) -> tuple[list[float], list[bool]]:
    """Score a target at each row of the logits."""
    log_probs, greedy = score_tokens(logits, torch.tensor(targets))
    assert log_probs.dtype == torch.float64
    return log_probs.tolist(), greedy.tolist()


def test_equals_the_softmax_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_scores, "_NUMBERS", 25)  # two places of 11 logits at a time
    torch.manual_seed(0)
    logits, targets = torch.randn(15, 11, dtype=torch.float64), torch.randint(0, 11, (15,))
    log_probs, greedy = score_tokens(logits, targets)
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert log_probs.tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert torch.equal(greedy, logits.argmax(-1) == targets)


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0]]).expand(3, 3)
    assert score(logits, [0, 1, 2])[1] == [False, True, False]
    assert score(torch.zeros(2, 4), [0, 1])[1] == [True, False]


def test_narrow_logits_are_widened_before_the_softmax() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).mul(4).bfloat16()
    expected = logits.double().log_softmax(-1)[range(50), range(50)]
    assert score(logits, list(range(50)))[0] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_token_without_probability_is_minus_infinity() -> None:
    assert score(torch.tensor([[0.0, -math.inf]]), [1]) == ([-math.inf], [False])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_logits_that_are_no_numbers(bad: float) -> None:
    with pytest.raises(NonFiniteError, match=r"logits: got NaN or infinity"):
        score(torch.tensor([[0.0, 1.0, bad]]), [0])
    with pytest.raises(NonFiniteError):
        score(torch.full((1, 3), -math.inf), [0])


def test_refuses_a_token_beyond_the_logits() -> None:
    for target in (3, -1):
        with pytest.raises(ConfigError, match=r"token ids: got -?\d+ to .*expected 0 to 2"):
            score(torch.zeros(1, 3), [target])
