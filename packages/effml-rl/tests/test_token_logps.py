"""Log-probabilities and entropies: against a whole log-softmax, in chunks, under padding, with foreign models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from effml_rl.policy_loss import policy_loss
from effml_rl.rollout_batch import completion_mask
from effml_rl.token_logps import chunked_token_logps, token_logps
from effml_shared.errors import ConfigError
from effml_shared.generation import generate
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn

F64 = torch.float64


def transformer(dtype: torch.dtype = F64) -> Transformer:
    config = TransformerConfig(vocab_size=11, d_model=16, n_layers=2, n_heads=2)
    return Transformer(config, seed=0).to(dtype)


def tokens(rows: int = 3, prompt: int = 4, completion: int = 5) -> tuple[Tensor, Tensor]:
    """Return ids and mask of prompts of 4, 3, ... tokens, padded on the left."""
    ids = torch.randint(0, 11, (rows, prompt + completion), generator=torch.Generator().manual_seed(0))
    return ids, torch.arange(prompt + completion) >= torch.arange(rows).unsqueeze(1)


def naive(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logps = (logits / temperature).log_softmax(-1)
    return logps.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 2, 4, 7, 100])
@pytest.mark.parametrize("start", ["logits", "weight", "module"])
def test_chunks_equal_the_whole(temperature: float, chunk: int, start: str) -> None:
    torch.manual_seed(0)
    head = nn.Linear(6, 11, bias=False, dtype=F64)
    hidden = torch.randn(3, 5, 6, dtype=F64, requires_grad=True)
    ids = torch.randint(0, 11, (3, 5))
    start_from = head(hidden) if start == "logits" else hidden
    given = {"logits": None, "weight": head.weight, "module": head}[start]
    got = chunked_token_logps(start_from, given, ids, temperature=temperature, chunk=chunk)
    wanted = naive(head(hidden), ids, temperature)
    weights = torch.randn(2, 3, 5, dtype=F64)
    gradients = [
        torch.autograd.grad((weights[0] * a + weights[1] * b).sum(), [hidden, head.weight]) for a, b in (got, wanted)
    ]
    for ours, theirs in zip((*got, *gradients[0]), (*wanted, *gradients[1]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
@pytest.mark.parametrize("entropy", ["value", "none"])
@pytest.mark.parametrize("sliced", [False, True])
def test_without_a_gradient_of_the_entropy_it_is_the_same(
    temperature: float, chunk: int, entropy: str, sliced: bool
) -> None:
    torch.manual_seed(0)
    logits = (5 * torch.randn(3, 7 if sliced else 5, 11, dtype=F64)).index_fill(2, torch.tensor([9, 10]), -torch.inf)
    logits.requires_grad_()
    view, ids = logits[:, -5:], torch.randint(0, 9, (3, 5))
    got = chunked_token_logps(view, None, ids, temperature=temperature, chunk=chunk, entropy=entropy)
    expected = chunked_token_logps(view, None, ids, temperature=temperature, chunk=chunk)
    torch.testing.assert_close(got.logps, expected.logps, atol=1e-13, rtol=0)
    if entropy == "value":
        torch.testing.assert_close(got.entropy, expected.entropy, atol=1e-13, rtol=0)
        assert not got.entropy.requires_grad
    else:
        assert got.entropy.isnan().all()
    weights = torch.randn(3, 5, dtype=F64)
    ours, theirs = (torch.autograd.grad((weights * a.logps).sum(), logits)[0] for a in (got, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)


def test_rows_beyond_the_vocabulary_leave_entropy_and_gradient_finite() -> None:
    logits = torch.randn(2, 3, 7, dtype=F64)
    padded = torch.cat([logits, torch.full((2, 3, 2), -torch.inf, dtype=F64)], -1).requires_grad_()
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]])
    got = chunked_token_logps(padded, None, ids)
    for ours, theirs in zip(got, naive(logits, ids, 1.0), strict=True):
        torch.testing.assert_close(ours, theirs)
    (gradient,) = torch.autograd.grad((got.logps + got.entropy).sum(), padded)
    assert gradient.isfinite().all()
    assert gradient[..., 7:].eq(0).all()


@pytest.mark.parametrize("entropy", ["gradient", "value"])
def test_half_precision_logits_are_reduced_in_float32(entropy: str) -> None:
    logits = (10 * torch.randn(2, 4, 300)).bfloat16().requires_grad_()
    ids = torch.randint(0, 300, (2, 4))
    got = chunked_token_logps(logits, None, ids, chunk=3, entropy=entropy)
    assert got.logps.dtype == got.entropy.dtype == torch.float32
    for ours, theirs in zip(got, naive(logits.double(), ids, 1.0), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-4, rtol=0)
    got.logps.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 1e-5)])
def test_a_padded_row_equals_the_row_alone(dtype: torch.dtype, tolerance: float) -> None:
    model = transformer(dtype)
    ids, mask = tokens()
    together = token_logps(model, ids, mask, 4, temperature=0.8)
    for row in range(3):
        alone = token_logps(model, ids[row : row + 1, row:], mask[row : row + 1, row:], 4 - row, temperature=0.8)
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[row], theirs[0], atol=tolerance, rtol=0)


def test_they_are_the_samplers_log_probs() -> None:
    model = transformer(torch.float32)
    ids, mask = tokens(completion=0)
    sampled = generate(
        model, ids, mask, max_new_tokens=6, do_sample=True, temperature=0.7, seeds=[1, 2, 3], return_logprobs=True
    )
    whole = torch.cat([mask, sampled.mask], 1)
    got = token_logps(model, sampled.ids, whole, 4, temperature=0.7)
    assert sampled.sampling_log_probs is not None
    torch.testing.assert_close(got.logps, sampled.sampling_log_probs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("hide", [False, True])
def test_what_follows_the_end_changes_no_bit_of_the_gradient(hide: bool) -> None:
    """Causality suffices: with or without the attention mask over the tail."""
    results = []
    for tail in (5, 6):
        model = transformer()
        ids = torch.tensor([[3, 4, 7, 2, tail, tail], [8, 4, 2, tail, tail, tail]])
        mask, _ = completion_mask(ids[:, 2:], 2)
        assert mask.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]
        attention = torch.cat([torch.ones(2, 2, dtype=torch.bool), mask if hide else torch.ones_like(mask)], 1)
        logps, _ = token_logps(model, ids, attention, 2)
        loss, _ = policy_loss(logps, None, torch.tensor([[1.0], [-0.5]], dtype=F64), mask)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, theirs in zip(*results, strict=True):
        assert ours.equal(theirs)


class Foreign(nn.Module):
    """Someone else's model: it takes only what `accepts` lets through, and returns all positions."""

    def __init__(self, inner: Transformer) -> None:
        super().__init__()
        self.inner = inner


class KeywordModel(Foreign):
    def forward(self, input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
        kwargs.pop("logits_to_keep")
        return SimpleNamespace(logits=self.inner(input_ids, **kwargs).logits)


class MaskModel(Foreign):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.inner(input_ids, attention_mask=attention_mask).logits)


class BareModel(Foreign):
    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.inner(input_ids).logits)


@pytest.mark.parametrize("foreign", [KeywordModel, MaskModel])
def test_models_are_given_what_they_take(foreign: type[Foreign]) -> None:
    model = transformer()
    ids, mask = tokens()
    expected = token_logps(model, ids, mask, 4)
    for ours, theirs in zip(token_logps(foreign(model), ids, mask, 4), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_a_model_without_a_mask_serves_unpadded_prompts_only() -> None:
    model = transformer()
    ids, mask = tokens()
    full = torch.ones_like(mask)
    torch.testing.assert_close(
        token_logps(BareModel(model), ids, full, 4).logps, token_logps(model, ids, full, 4).logps
    )
    with pytest.raises(ConfigError, match=r"model: got one without attention_mask for padded prompts"):
        token_logps(BareModel(model), ids, mask, 4)


def test_bad_input_is_named() -> None:
    model = transformer()
    ids, mask = tokens()
    for length in (0, 9):
        with pytest.raises(ConfigError, match=rf"prompt_len: got {length}, expected 1 to 8"):
            token_logps(model, ids, mask, length)
    with pytest.raises(ConfigError, match=r"temperature: got 0\.0"):
        token_logps(model, ids, mask, 4, temperature=0.0)
    with pytest.raises(ConfigError, match=r"chunk: got 0"):
        token_logps(model, ids, mask, 4, chunk=0)
    with pytest.raises(ConfigError, match=r"input_ids, attention_mask: got shapes \(3, 9\) and \(3, 8\)"):
        token_logps(model, ids, mask[:, 1:], 4)
    with pytest.raises(ConfigError, match=r"entropy: got 'some', expected one of 'gradient'"):
        token_logps(model, ids, mask, 4, entropy="some")
    with pytest.raises(ConfigError, match=r"output without logits"):
        token_logps(nn.Embedding(11, 4), ids, torch.ones_like(mask), 4)
    with pytest.raises(ConfigError, match=r"ids: got shape \(3, 4\)"):
        chunked_token_logps(torch.zeros(3, 5, 7), None, torch.zeros(3, 4, dtype=torch.int64))
