"""Generative perplexity: one sample at a time by hand, ends of sequences, both averages, texts."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from effml_diffusion.generative_perplexity import generative_perplexity, load_judge
from effml_diffusion.text_quality import token_entropy
from effml_shared.data import ByteTokenizer
from effml_shared.errors import ConfigError, MissingExtra
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor

EOS = 0
BIGRAM = torch.randn(7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)


def judge(ids: Tensor, attention_mask: Tensor) -> Tensor:
    assert attention_mask.shape == ids.shape
    return BIGRAM[ids]


def nats_by_hand(sample: list[int]) -> tuple[float, int]:
    total, count = 0.0, 0
    for before, token in pairwise(sample):
        total, count = total - float(BIGRAM[before, token]), count + 1
        if token == EOS:
            break
    return total, count


SAMPLES = [[1, 2, 3, EOS, 4, EOS], [EOS, 5, 6, EOS, EOS, EOS], [3, 3], [2, EOS, 1], [6], []]


@pytest.mark.parametrize("batch_size", [1, 4, 99])
def test_samples_one_by_one(batch_size: int) -> None:
    found = generative_perplexity(SAMPLES, judge, eos_id=EOS, batch_size=batch_size)
    expected = [nats_by_hand(sample) for sample in SAMPLES]
    assert found.nats.tolist() == pytest.approx([nats for nats, _ in expected])
    assert found.n_tokens.tolist() == [n for _, n in expected] == [3, 3, 1, 1, 0, 0]
    assert found.perplexity == pytest.approx(math.exp(sum(nats for nats, _ in expected) / 8))
    assert found.entropy[:2].tolist() == pytest.approx([math.log(4), 1.5 * math.log(2)])
    mean = generative_perplexity(SAMPLES, judge, eos_id=EOS, aggregate="mean").perplexity
    assert mean == pytest.approx(sum(math.exp(nats / n) for nats, n in expected if n) / 4)


def test_without_an_end_everything_counts() -> None:
    ids = torch.tensor(SAMPLES[:2])
    found = generative_perplexity(ids, judge)
    assert found.n_tokens.tolist() == [5, 5]
    assert found.entropy.tolist() == pytest.approx(token_entropy(ids).tolist())
    assert generative_perplexity(ids, judge, max_length=3).n_tokens.tolist() == [2, 2]


def test_the_baseline_transformer_judges_texts() -> None:
    tokenizer = ByteTokenizer()
    config = TransformerConfig(vocab_size=258, n_layers=1, d_model=16, n_heads=2, d_ff=32)
    model = Transformer(config).eval()
    texts = ["to be or not", "to"]
    found = generative_perplexity(texts, model, tokenizer=tokenizer)
    for text, nats in zip(texts, found.nats.tolist(), strict=True):
        ids = torch.as_tensor(tokenizer.encode(text))[None]
        with torch.no_grad():
            assert nats == pytest.approx(float(model(ids, labels=ids).loss_sum), rel=1e-5)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"pip install 'effml-diffusion\[hf\]'"):
        load_judge()


def test_bad_input_is_refused() -> None:
    for samples, options, message in (
        (["text"], {}, r"tokenizer: got None for texts"),
        ("text", {}, r"samples: got one text"),
        (torch.tensor([1, 2]), {}, r"samples: got shape \(2,\)"),
        ([], {}, r"samples: got nothing to score"),
        ([[1], []], {}, r"samples: got nothing to score"),
        ([[1, 2]], {"aggregate": "median"}, r"aggregate: got 'median'"),
        ([[1, 2]], {"max_length": 1}, r"max_length: got 1"),
        ([[1, 2]], {"batch_size": 0}, r"batch_size: got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            generative_perplexity(samples, judge, **options)
