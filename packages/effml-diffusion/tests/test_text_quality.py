"""Entropy, distinct n-grams and self-BLEU against counting in plain Python."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from effml_diffusion.text_quality import distinct_n, self_bleu, token_entropy
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st

SAMPLES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=7), min_size=2, max_size=5)


def padded(samples: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, samples))
    ids = torch.tensor([sample + [1] * (width - len(sample)) for sample in samples])
    return ids, torch.arange(width) < torch.tensor([[len(sample)] for sample in samples])


def test_entropy_of_all_different_and_all_equal_tokens() -> None:
    ids = torch.stack([torch.randperm(1024, generator=torch.Generator().manual_seed(0)), torch.full((1024,), 7)])
    assert token_entropy(ids).tolist() == pytest.approx([math.log(1024), 0.0])
    assert float(token_entropy(ids)[0]) == pytest.approx(6.9315, abs=5e-5)
    assert token_entropy(ids, unit="bits").tolist() == pytest.approx([10.0, 0.0])


@given(SAMPLES)
@settings(max_examples=50, deadline=None)
def test_entropy_by_hand(samples: list[list[int]]) -> None:
    ids, valid = padded(samples)
    expected = [-sum(n / len(s) * math.log(n / len(s)) for n in Counter(s).values()) for s in samples]
    assert token_entropy(ids, valid).tolist() == pytest.approx(expected)
    shuffled = torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))
    assert token_entropy(ids[:, shuffled], valid[:, shuffled]).tolist() == pytest.approx(expected)


def test_entropy_of_nothing() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    assert token_entropy(ids, ids > 0).tolist() == token_entropy(ids[:, :0]).tolist() == [0.0, 0.0]


@given(SAMPLES, st.integers(1, 3))
@settings(max_examples=50, deadline=None)
def test_distinct_by_hand(samples: list[list[int]], n: int) -> None:
    ids, valid = padded(samples)
    grams = [tuple(s[i : i + n]) for s in samples for i in range(len(s) - n + 1)]
    if grams:
        assert distinct_n(ids, n, valid) == pytest.approx(len(set(grams)) / len(grams))
    else:
        with pytest.raises(ConfigError, match=r"ids: got no \d valid tokens in a row"):
            distinct_n(ids, n, valid)


def bleu(sample: list[int], others: list[list[int]], max_n: int) -> float:
    total = 0.0
    for n in range(1, max_n + 1):
        counts = [Counter(tuple(s[i : i + n]) for i in range(len(s) - n + 1)) for s in (sample, *others)]
        matches = sum(min(k, max(c[gram] for c in counts[1:])) for gram, k in counts[0].items())
        total += math.log((matches or 0.1) / max(1, len(sample) - n + 1)) / max_n
    closest = min((len(s) for s in others), key=lambda length: (abs(length - len(sample)), length))
    return math.exp(total) * (math.exp(1 - closest / len(sample)) if closest > len(sample) else 1.0)


@given(SAMPLES, st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_self_bleu_pair_by_pair(samples: list[list[int]], max_n: int) -> None:
    expected = [bleu(s, samples[:i] + samples[i + 1 :], max_n) for i, s in enumerate(samples)]
    assert self_bleu(*padded(samples), max_n=max_n) == pytest.approx(sum(expected) / len(expected))


def test_bad_input_is_refused() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"unit: got 'digits'"):
        token_entropy(ids, unit="digits")
    with pytest.raises(ConfigError, match=r"ids: got shape \(3,\)"):
        token_entropy(ids[0])
    with pytest.raises(ConfigError, match=r"valid: got shape \(2, 2\), expected \(2, 3\)"):
        token_entropy(ids, ids[:, :2] == 0)
    with pytest.raises(ConfigError, match=r"ids: got no 4 valid tokens in a row"):
        distinct_n(ids, 4)
    with pytest.raises(ConfigError, match=r"ids: got 1 samples"):
        self_bleu(ids[:1])
    with pytest.raises(ConfigError, match=r"max_n: got 0"):
        self_bleu(ids, max_n=0)
