"""The likelihood bound: estimates around the exact number, with honest standard errors, and ways to misuse them."""

import math
from typing import Any

import pytest
import torch
from effml_diffusion.likelihood import log_likelihood, nelbo
from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_shared.errors import ConfigError
from effml_shared.seeding import generator
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor

X = torch.tensor([3, 0, 6, 1, 1, 4])


class Table:
    """A random function of which of six positions are masked, 64 rows of logits: no matter how often it is called."""

    def __init__(self) -> None:
        self.logits = 2 * torch.randn(64, 6, 8, dtype=torch.float64, generator=generator(0, "table"))
        self.rows = 0

    def __call__(self, ids: Tensor) -> Tensor:
        self.rows += len(ids)
        return self.logits[((ids == 7) << torch.arange(6)).sum(1)]


@pytest.fixture
def diffusion() -> MaskedDiffusion:
    return MaskedDiffusion(Table(), 7)


def test_the_exact_bound_of_the_exact_posterior_is_the_entropy(reference_law: Any, exact_posterior: Any) -> None:
    model = exact_posterior(reference_law)
    for schedule in ("linear", "geometric(1e-5, 20)"):
        bounds = MaskedDiffusion(model, 3, schedule=schedule).exact_nelbo(model.sequences)
        assert float((bounds * model.probs).sum()) == pytest.approx(model.entropy, abs=1e-12)
    torch.testing.assert_close(bounds >= -model.probs.log() - 1e-12, torch.ones(27, dtype=torch.bool))


def test_the_exact_bound_is_the_mean_over_orders(diffusion: MaskedDiffusion) -> None:
    """-E_order sum_k log f(x_k | those before it), over all 720 orders."""
    from itertools import permutations

    logp = Table().logits[..., :7].log_softmax(-1)[:, torch.arange(6), X]  # of the true tokens: (64, 6)
    total = 0.0
    for order in permutations(range(6)):
        masked = 63
        for position in order:
            total -= float(logp[masked, position])
            masked -= 1 << position
    assert float(diffusion.exact_nelbo(X[None])) == pytest.approx(total / 720, rel=1e-12)


@pytest.mark.parametrize("estimator", ["count", "time"])
def test_estimates_surround_the_exact_bound(estimator: str, diffusion: MaskedDiffusion) -> None:
    exact = float(diffusion.exact_nelbo(X[None]))
    calls = X.expand(2000, 6)
    bound = diffusion.nelbo(
        calls, n_mc=16, groups=4, estimator=estimator, batch_size=4000, generator=generator(1, estimator)
    )
    stderr = float(bound.nats.std()) / 2000**0.5
    assert abs(float(bound.nats.mean()) - exact) < 3 * stderr
    assert stderr * 2000**0.5 == pytest.approx(float(bound.stderr.square().mean().sqrt()), rel=0.1)
    torch.testing.assert_close(bound.per_position.sum(1), bound.nats, rtol=1e-12, atol=0)
    assert bound.perplexity == pytest.approx(math.exp(float(bound.nats.mean()) / 6))


def test_counts_vary_less_than_times(diffusion: MaskedDiffusion) -> None:
    spread = {
        estimator: float(diffusion.nelbo(X.expand(500, 6), n_mc=4, groups=1, estimator=estimator).nats.std())
        for estimator in ("count", "time")
    }
    assert spread["count"] < 0.7 * spread["time"]


def test_counts_are_uniform_even_where_steps_end_in_a_half() -> None:
    """Six tokens, four draws: j 6 / 4 = 1.5. Rounding half to even after adding k would never draw an odd count."""
    seen: list[int] = []

    def model(ids: Tensor) -> Tensor:
        seen.extend((ids == 7).sum(1).tolist())
        return torch.zeros(*ids.shape, 8)

    nelbo(MaskedDiffusion(model, 7), X.expand(1500, 6), n_mc=4, groups=1, generator=generator(0, "counts"))
    counts = torch.bincount(torch.tensor(seen).view(1500, 4)[:, 1], minlength=7)
    assert counts[0] == 0
    assert ((counts[1:] - 250).abs() < 4 * (1500 * 5 / 36) ** 0.5).all()
    assert all(len(set(row)) == 4 for row in torch.tensor(seen).view(1500, 4).tolist())


def test_a_uniform_model_has_no_variance_by_counts() -> None:
    diffusion = MaskedDiffusion(lambda ids: torch.zeros(*ids.shape, 8, dtype=torch.float64), 7)
    bound = diffusion.nelbo(X.expand(5, 6), n_mc=8)
    torch.testing.assert_close(bound.nats, torch.full((5,), 6 * math.log(7), dtype=torch.float64), rtol=1e-12, atol=0)
    assert bound.stderr.max() < 1e-12
    by_time = diffusion.nelbo(X.expand(500, 6), n_mc=16, groups=2, estimator="time", generator=generator(0, "flat"))
    assert float(by_time.nats.mean()) == pytest.approx(6 * math.log(7), abs=4 * float(by_time.nats.std()) / 500**0.5)
    assert bound.perplexity == pytest.approx(7)


def test_answers_are_scored_given_their_prompts() -> None:
    config = TransformerConfig(n_layers=1, d_model=16, n_heads=2, d_ff=16, vocab_size=8, causal=False)
    diffusion = MaskedDiffusion(Transformer(config).double(), 7)
    prompt, answer = X[:2].expand(2, 2), torch.stack([X[2:], X[:4]])
    both = torch.cat([prompt, answer], dim=1)
    maskable = torch.arange(6).expand(2, 6) >= 2
    exact = diffusion.exact_nelbo(both, maskable=maskable)
    got = log_likelihood(diffusion, prompt, answer, n_mc=512, generator=generator(0, "answers"))
    assert ((got.nats + exact).abs() < 4 * got.stderr).all()
    assert (got.nats < 0).all()
    single = diffusion.log_likelihood(X[:2], X[2:], n_mc=64, generator=generator(0, "answers"))
    assert single.nats.shape == single.stderr.shape == (1,)
    again = diffusion.log_likelihood(X[:2], X[2:], n_mc=64, generator=generator(0, "answers"), batch_size=7)
    assert torch.allclose(again.nats, single.nats, atol=3 * float(single.stderr))


def test_rows_keep_their_own_inputs_and_lengths() -> None:
    """Padding, per-row inputs of the network and rows without a token to predict."""
    config = TransformerConfig(n_layers=1, d_model=16, n_heads=2, d_ff=16, vocab_size=9, causal=False)
    diffusion = MaskedDiffusion(Transformer(config).double(), 7, pad_id=8)
    x = torch.stack([X, torch.tensor([3, 0, 6, 8, 8, 8]), torch.full((6,), 8)])
    attention_mask = torch.tensor([[1] * 6, [1] * 6, [1] * 6])
    bound = diffusion.nelbo(x[:2], n_mc=256, generator=generator(0, "rows"))
    exact = diffusion.exact_nelbo(x[:2])
    alone = diffusion.exact_nelbo(x[1:2, :3])
    assert ((bound.nats - exact).abs() < 4 * bound.stderr).all()
    torch.testing.assert_close(exact[1:], alone, rtol=1e-12, atol=0)
    assert bound.n_tokens.tolist() == [6, 3]
    assert (bound.per_position[1, 3:] == 0).all()
    doc_ids = torch.zeros_like(x)
    torch.testing.assert_close(diffusion.exact_nelbo(x[:1], doc_ids=doc_ids[:1]), exact[:1])
    empty = diffusion.nelbo(x, n_mc=8, attention_mask=attention_mask * 0 + (x != 8), doc_ids=doc_ids)
    assert empty.nats[2] == 0
    assert diffusion.exact_nelbo(x, maskable=torch.zeros_like(x, dtype=torch.bool)).tolist() == [0, 0, 0]


def test_nothing_is_recorded_for_a_backward_pass() -> None:
    config = TransformerConfig(n_layers=1, d_model=16, n_heads=2, d_ff=16, vocab_size=8, causal=False)
    diffusion = MaskedDiffusion(Transformer(config), 7)
    assert not diffusion.nelbo(X[None], n_mc=8).nats.requires_grad
    assert not diffusion.exact_nelbo(X[None]).requires_grad
    assert diffusion.nelbo(X[None], n_mc=2, groups=1).stderr.isnan().all()
    assert diffusion.nelbo(X.expand(0, 6), n_mc=8).nats.shape == (0,)


def test_bad_input_is_one_clear_line(diffusion: MaskedDiffusion) -> None:
    for options, message in (
        ({"n_mc": 12}, r"n_mc: got 12, expected a multiple of groups = 8"),
        ({"n_mc": 4}, r"n_mc: got 4, expected an integer of at least 8"),
        ({"groups": 0}, r"groups: got 0"),
        ({"batch_size": 0}, r"batch_size: got 0"),
        ({"estimator": "counts"}, r"estimator: got 'counts', expected one of 'count', 'time'"),
        ({"maskable": torch.ones(1, 5)}, r"maskable: got shape \(1, 5\), expected \(1, 6\)"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            diffusion.nelbo(X[None], **options)
    with pytest.raises(ConfigError, match=r"^prompt, answer: got shapes \(1, 6\) and \(2, 6\), expected"):
        diffusion.log_likelihood(X, X.expand(2, 6))
    with pytest.raises(ConfigError, match=r"^x: got 17 maskable tokens in row 0, expected at most 16"):
        diffusion.exact_nelbo(torch.zeros(1, 17, dtype=torch.int64))
