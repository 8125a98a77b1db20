from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from effml_shared.errors import ConfigError
from effml_shared.tensors import chunked_cross_entropy, cross_entropy_sum, gather_log_probs, left_pad, masked_mean


@pytest.fixture
def head() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (3, 7, 8), a head of 11 ids in 16 rows, and targets of which some are ignored."""
    stream = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 8, generator=stream, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, 8, generator=stream, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (3, 7), generator=stream)
    targets[0, :4] = targets[2, 3] = -100
    return hidden, weight, targets


def test_masked_mean_ignores_what_is_masked_even_nan() -> None:
    values = torch.tensor([[1.0, float("nan")], [3.0, 5.0]])
    mask = torch.tensor([[True, False], [True, True]])
    assert masked_mean(values, mask).item() == 3.0
    assert masked_mean(values, mask, dim=1).tolist() == [1.0, 4.0]
    assert masked_mean(values, mask & False).item() == 0.0


def test_masked_mean_accumulates_in_float32() -> None:
    values = torch.ones(5000, dtype=torch.bfloat16)
    assert masked_mean(values, torch.ones(5000, dtype=torch.bool)).item() == 1.0


def test_gather_log_probs_is_log_softmax() -> None:
    logits = torch.randn(2, 5, 9, dtype=torch.float64)
    ids = torch.randint(9, (2, 5))
    expected = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(gather_log_probs(logits, ids), expected, rtol=0, atol=1e-14)
    assert gather_log_probs(logits.bfloat16(), ids).dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, 4, 21, 100])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_chunked_equals_full(head: tuple[torch.Tensor, ...], chunk: int, z_loss: float) -> None:
    hidden, weight, targets = head
    logits = (hidden @ weight.T)[..., :11]
    kept = targets != -100
    full = F.cross_entropy(logits[kept], targets[kept], reduction="sum")
    full = full + z_loss * logits[kept].logsumexp(-1).square().sum()
    loss, count = chunked_cross_entropy(hidden, weight, targets, chunk=chunk, vocab_size=11, z_loss=z_loss)
    assert count.item() == kept.sum().item()
    torch.testing.assert_close(loss, full, rtol=1e-14, atol=0)
    for got, expected in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(full, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_padded_rows_get_no_gradient(head: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets = head
    loss, _ = chunked_cross_entropy(hidden, weight, targets, chunk=4, vocab_size=11)
    assert not torch.autograd.grad(loss, weight)[0][11:].any()


def test_gradients_by_finite_differences(head: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets = head

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(hidden, weight, targets, chunk=5, vocab_size=11, z_loss=0.3)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight), fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, (hidden, weight), fast_mode=True)


@pytest.mark.parametrize("chunk", [4, 100])
def test_nothing_counted_is_zero_with_zero_gradients(head: tuple[torch.Tensor, ...], chunk: int) -> None:
    hidden, weight, targets = head
    loss, count = chunked_cross_entropy(hidden, weight, torch.full_like(targets, -100), chunk=chunk, z_loss=1.0)
    assert (loss.item(), count.item()) == (0.0, 0)
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (hidden, weight)))


def test_never_holds_the_whole_logits(head: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets = head
    sizes = []

    def watch(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
        cross_entropy_sum(hidden @ weight.T, targets)
    assert max(sizes) == targets.numel() * 16
    sizes.clear()
    with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
        chunked_cross_entropy(hidden, weight, targets, chunk=2)
    assert max(sizes, default=0) <= hidden.numel()


def test_runs_in_bfloat16_and_accumulates_in_float32(head: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, targets = head
    exact = chunked_cross_entropy(hidden, weight, targets, chunk=4)[0]
    hidden, weight = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = chunked_cross_entropy(hidden, weight, targets, chunk=4)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_left_pad() -> None:
    ids, mask = left_pad([[5, 6], [7], [8, 9, 10]], pad_id=1)
    assert ids.tolist() == [[1, 5, 6], [1, 1, 7], [8, 9, 10]]
    assert mask.tolist() == [[False, True, True], [False, False, True], [True, True, True]]


@pytest.mark.parametrize("rows", [[], [[1], []]])
def test_left_pad_refuses_empty_rows(rows: list[list[int]]) -> None:
    with pytest.raises(ConfigError, match="rows: got"):
        left_pad(rows, pad_id=0)


def test_chunk_must_be_positive(head: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(ConfigError, match="chunk: got 0"):
        chunked_cross_entropy(*head, chunk=0)
