import math

import pytest
from effml_eval.metrics.text_likelihood import bits_per_byte, perplexity, text_likelihood
from effml_eval.scoring.scorer import RollingScore
from effml_shared.errors import ConfigError


def test_ratios_of_sums():
    assert bits_per_byte([-12.0], [10]) == pytest.approx(1.731234, abs=5e-7)
    assert perplexity([-2.0, -3.0], [1, 9]) == pytest.approx(1.648721, abs=5e-7)
    assert (math.exp(2) + math.exp(3 / 9)) / 2 == pytest.approx(4.39, abs=5e-3)  # what it is not


@pytest.mark.parametrize("vocabulary", [2, 256, 50_257])
def test_uniform_model(vocabulary):
    tokens = [3, 1, 40]
    logprobs = [-count * math.log(vocabulary) for count in tokens]
    assert perplexity(logprobs, tokens) == pytest.approx(vocabulary, rel=1e-12)
    if vocabulary == 256:
        assert bits_per_byte(logprobs, tokens) == pytest.approx(8, rel=1e-12)


def test_corpus():
    documents = [RollingScore(-2.0 - i % 7, 1 + i, 4 + 2 * i, 1 + i // 2) for i in range(20)]
    estimates = text_likelihood([*documents, RollingScore(0.0, 0, 0, 0)], resamples=500)
    total = -sum(d.logprob for d in documents)
    assert estimates["token_ppl"].value == pytest.approx(math.exp(total / sum(d.n_tokens for d in documents)))
    assert estimates["word_ppl"].value == pytest.approx(math.exp(total / sum(d.n_words for d in documents)))
    n_bytes = sum(d.n_bytes for d in documents)
    assert estimates["byte_ppl"].value == pytest.approx(math.exp(total / n_bytes))
    assert estimates["bits_per_byte"].value == pytest.approx(total / n_bytes / math.log(2))
    assert math.log2(estimates["byte_ppl"].value) == pytest.approx(estimates["bits_per_byte"].value)
    for estimate in estimates.values():
        assert estimate.ci_low < estimate.value < estimate.ci_high
        assert estimate.n == 20
    clustered = text_likelihood(documents, clusters=[i // 5 for i in range(20)], method="bca", resamples=500)
    assert clustered["bits_per_byte"].method == "bootstrap bca, clustered"


def test_documents_without_words_have_no_word_perplexity():
    estimates = text_likelihood([RollingScore(-3.0, 3, 3, 2), RollingScore(-1.0, 2, 2, 0)])
    assert set(estimates) == {"token_ppl", "byte_ppl", "bits_per_byte"}


def test_a_hopeless_model_is_infinitely_perplexed():
    assert perplexity([-1e6], [1]) == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: perplexity([], []), "logprobs: got shape"),
        (lambda: perplexity([-1.0], [0]), "counts: got 1, expected 1 of at least 0, not all of them 0"),
        (lambda: perplexity([-1.0, -1.0], [1]), "counts: got 1, expected 2"),
        (lambda: perplexity([-1.0, -1.0], [3, -1]), "counts: got"),
        (lambda: bits_per_byte([math.nan], [1]), "logprobs: got nan at index 0"),
        (lambda: text_likelihood([]), "documents: got 0 without any token"),
        (lambda: text_likelihood([RollingScore(0.0, 0, 0, 0)]), "documents: got 1 without any token"),
        (lambda: text_likelihood([RollingScore(-1.0, 1, 1, 1)], clusters=[]), "clusters: got 0 labels"),
        (lambda: text_likelihood([RollingScore(math.nan, 1, 1, 1)]), "numerators: got nan"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
