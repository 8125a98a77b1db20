"""Policy losses by hand, against scalar formulas written out, and as exact policy gradients of a tiny language."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from effml_rl.gae import gae
from effml_rl.importance_weights import importance_ratio
from effml_rl.kl import kl
from effml_rl.policy_loss import policy_loss, policy_metrics
from effml_rl.rewards import token_rewards
from effml_shared.errors import ConfigError
from torch import Tensor

F64 = torch.float64
RATIOS = torch.tensor([[0.5, 0.9, 1, 1.3, 2, 5]], dtype=F64)
KINDS = ("ppo", "gspo", "cispo", "sapo")


def token_losses(ratios: Tensor, advantage: float, kind: str = "ppo", **options: Any) -> list[float]:
    """Return the losses of tokens one by one, each as a row of its own."""
    column = ratios.view(-1, 1)
    losses = [
        policy_loss(r.log(), torch.zeros_like(r), r.new_full((1, 1), advantage), r > 0, kind, **options)[0]
        for r in column.split(1)
    ]
    return [round(float(loss), 12) for loss in losses]


@pytest.mark.parametrize(
    ("advantage", "options", "expected"),
    [
        (1.0, {}, [-0.5, -0.9, -1, -1.2, -1.2, -1.2]),
        (1.0, {"clip": (0.2, 0.28)}, [-0.5, -0.9, -1, -1.28, -1.28, -1.28]),
        (-1.0, {}, [0.8, 0.9, 1, 1.3, 2, 5]),
        (-1.0, {"dual_clip": 3.0}, [0.8, 0.9, 1, 1.3, 2, 3]),
        (-1.0, {"delta": 3.0}, [0.8, 0.9, 1, 1.3, 2, 3]),
        (1.0, {"dual_clip": 3.0}, [-0.5, -0.9, -1, -1.2, -1.2, -1.2]),
        (1.0, {"delta": 3.0}, [-0.5, -0.9, -1, -1.2, -1.2, -1.2]),
        (0.0, {"dual_clip": 3.0}, [0, 0, 0, 0, 0, 0]),
    ],
)
def test_clipping_by_hand(advantage: float, options: dict[str, Any], expected: list[float]) -> None:
    assert token_losses(RATIOS, advantage, **options) == expected


class Case:
    """Three completions of lengths 5, 3 and 1, with garbage behind their ends."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=F64, generator=generator)

        self.lengths = [5, 3, 1]
        self.mask = torch.arange(5) < torch.tensor(self.lengths).unsqueeze(1)
        self.logps = (-1 - noise(3, 5).abs()).masked_fill(~self.mask, math.nan).requires_grad_()
        self.old = (self.logps.detach() + 0.4 * noise(3, 5)).masked_fill(~self.mask, math.inf)
        self.ref = self.logps.detach() + 0.4 * noise(3, 5)
        self.weight = noise(3, 5).exp()
        self.advantages = torch.tensor([[1.2], [-0.7], [0.4]], dtype=F64)

    def rows(self, tensor: Tensor) -> list[list[Tensor]]:
        return [[tensor[i, t] for t in range(length)] for i, length in enumerate(self.lengths)]


def scalar_losses(
    case: Case, kind: str, *, delta: float | None = None, weighted: bool, beta: float
) -> list[list[Tensor]]:
    """Return each counted token's loss from formulas of single numbers."""
    result = []
    data = zip(*map(case.rows, (case.logps, case.old, case.ref, case.weight)), case.advantages[:, 0], strict=True)
    for logps, old, ref, weight, advantage in data:
        sequence = torch.stack([a - b for a, b in zip(logps, old, strict=True)]).mean().exp()
        losses = []
        for a, b, r, w in zip(logps, old, ref, weight, strict=True):
            rho = sequence if kind == "gspo" else torch.exp(a - b)
            low, high = (3e-4, 4e-4) if kind == "gspo" else (0.2, 0.2)
            if kind == "cispo":
                loss = -min(rho.detach(), torch.tensor(delta or 5.0, dtype=F64)) * advantage * a
            elif kind == "sapo":
                tau = 1.0 if advantage > 0 else 1.05
                loss = -advantage * 4 / tau / (1 + torch.exp(-tau * (rho - 1)))
            else:
                clipped = torch.clamp(rho, 1 - low, 1 + high)
                free = rho if delta is None else torch.clamp(rho, max=delta)
                loss = -torch.minimum(free * advantage, clipped * advantage)
            loss = loss * w if weighted else loss
            losses.append(loss + beta * torch.exp(a - b) * (torch.exp(r - a) - (r - a) - 1) if beta else loss)
        result.append(losses)
    return result


def reduced(losses: list[list[Tensor]], reduction: str, max_len: int) -> Tensor:
    rows = [torch.stack(row) for row in losses]
    if reduction == "token_mean":
        return torch.cat(rows).mean()
    if reduction == "dr_grpo":
        return torch.cat(rows).sum() / (len(rows) * max_len)
    return torch.stack([row.mean() if reduction == "seq_mean_token_mean" else row.sum() for row in rows]).mean()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize(
    ("kind", "reduction", "options"),
    [
        ("ppo", "seq_mean_token_mean", {}),
        ("ppo", "token_mean", {}),
        ("ppo", "seq_mean_token_sum", {}),
        ("ppo", "dr_grpo", {"max_len": 7}),
        ("ppo", "token_mean", {"delta": 1.3}),
        ("gspo", None, {}),
        ("cispo", None, {}),
        ("cispo", None, {"delta": 0.8}),
        ("sapo", None, {}),
    ],
)
def test_losses_and_gradients_equal_the_scalar_formulas(
    kind: str, reduction: str | None, options: dict[str, Any], beta: float, weighted: bool
) -> None:
    case = Case()
    penalty = None
    if beta:
        ratio = importance_ratio(case.logps, case.old, case.mask)
        penalty = beta * kl(case.logps, case.ref, "k3_corrected", mask=case.mask, ratio=ratio)
    weight = case.weight.masked_fill(~case.mask, math.nan) if weighted else None
    total, count = policy_loss(
        case.logps,
        case.old,
        case.advantages,
        case.mask,
        kind,
        weight=weight,
        penalty=penalty,
        reduction=reduction,
        **options,
    )
    losses = scalar_losses(case, kind, delta=options.get("delta"), weighted=weighted, beta=beta)
    name = reduction or ("token_mean" if kind == "cispo" else "seq_mean_token_mean")
    expected = reduced(losses, name, options.get("max_len", 0))
    torch.testing.assert_close(total / count, expected, atol=1e-15, rtol=1e-15)
    (got,) = torch.autograd.grad(total / count, case.logps)
    (wanted,) = torch.autograd.grad(expected, case.logps)
    torch.testing.assert_close(got, wanted.masked_fill(~case.mask, 0.0), atol=1e-15, rtol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_first_pass_is_on_policy_to_the_bit(kind: str) -> None:
    case = Case()
    assert importance_ratio(case.logps, case.logps.detach(), case.mask).eq(1).all()
    results = []
    for old in (None, case.logps.detach()):
        total, count = policy_loss(case.logps, old, case.advantages, case.mask, kind)
        results.append(torch.autograd.grad(total / count, case.logps)[0])
    assert results[0].equal(results[1])
    mask = case.mask.double()
    share = 1 / mask.sum() if kind in ("ppo", "cispo") else mask / mask.sum(1, keepdim=True) / 3
    expected = (-case.advantages * share).expand(3, 5).masked_fill(~case.mask, 0.0)
    torch.testing.assert_close(results[0], expected, atol=1e-16, rtol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_the_end_changes_no_bit(kind: str) -> None:
    case = Case()
    results = []
    for garbage in (0.0, math.nan, -math.inf, 1e300):
        logps = case.logps.detach().masked_fill(~case.mask, garbage).requires_grad_()
        tokens = case.advantages.expand(3, 5).masked_fill(~case.mask, garbage)
        loss, _ = policy_loss(logps, case.old, tokens, case.mask, kind)
        results.append((loss.detach(), torch.autograd.grad(loss, logps)[0]))
    for loss, gradient in results[1:]:
        assert loss.equal(results[0][0])
        assert gradient.equal(results[0][1])
        assert gradient[~case.mask].eq(0).all()


class Language:
    """All nine texts of two tokens out of three, under a policy with one logit for each token in its place."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.first = torch.randn(3, dtype=F64, generator=generator).requires_grad_()
        self.second = torch.randn(3, 3, dtype=F64, generator=generator).requires_grad_()
        self.texts = torch.tensor(list(itertools.product(range(3), repeat=2)))
        self.rewards = torch.rand(9, dtype=F64, generator=generator)
        self.mask = torch.ones(9, 2, dtype=torch.bool)

    def logps(self) -> Tensor:
        first, second = self.texts.unbind(1)
        return torch.stack([self.first.log_softmax(0)[first], self.second.log_softmax(1)[first, second]], 1)

    def gradient(self, value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, [self.first, self.second])])


@pytest.mark.parametrize("kind", ["ppo", "cispo"])
@pytest.mark.parametrize("baseline", [0.0, 0.4])
def test_policy_gradient_is_exact_in_expectation(kind: str, baseline: float) -> None:
    language = Language()
    probabilities = language.logps().sum(1).exp()
    exact = language.gradient((probabilities * language.rewards).sum())
    weighted = (probabilities.detach() * (language.rewards - baseline)).unsqueeze(1)
    loss, _ = policy_loss(language.logps(), None, weighted, language.mask, kind, reduction="seq_mean_token_sum")
    torch.testing.assert_close(-language.gradient(loss), exact, atol=1e-16, rtol=1e-13)


def test_sampled_policy_gradient_agrees_within_its_error() -> None:
    language = Language()
    logps = language.logps()
    probabilities = logps.sum(1).exp()
    exact = language.gradient((probabilities * language.rewards).sum())
    draws = torch.multinomial(
        probabilities.detach(), 4096, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    counts = draws.bincount(minlength=9)
    loss, count = policy_loss(
        language.logps()[draws],
        None,
        language.rewards[draws].unsqueeze(1),
        language.mask[draws],
        reduction="seq_mean_token_sum",
    )
    scores = torch.stack([language.gradient(language.logps()[i].sum()) * language.rewards[i] for i in range(9)])
    mean = (counts.unsqueeze(1) * scores).sum(0) / 4096
    estimate = -language.gradient(loss / count)
    torch.testing.assert_close(estimate, mean, atol=1e-13, rtol=0)
    spread = ((probabilities.detach().unsqueeze(1) * (scores - exact) ** 2).sum(0) / 4096).sqrt()
    assert ((estimate - exact).abs() < 4 * spread).all()


def test_ppo_without_a_critic_is_reinforce() -> None:
    language = Language()
    rewards = token_rewards(language.rewards, language.mask, limit=None)
    tokens, _ = gae(rewards, torch.zeros_like(rewards), language.mask, lam=1.0)
    losses = [
        policy_loss(language.logps(), None, advantages, language.mask)[0]
        for advantages in (tokens, language.rewards.unsqueeze(1))
    ]
    torch.testing.assert_close(language.gradient(losses[0]), language.gradient(losses[1]), atol=1e-15, rtol=0)


def test_metrics_count_what_clipping_cuts_off() -> None:
    mask = torch.tensor([[True] * 6 + [False]]).expand(2, 7)
    logps = torch.cat([RATIOS, RATIOS.new_tensor([[math.nan]])], 1).log().expand(2, 7)
    advantages = torch.tensor([[1.0], [-1.0]], dtype=F64)
    metrics = policy_metrics(logps, torch.zeros_like(logps), advantages, mask)
    got = {name: round(float(value), 6) for name, value in metrics.items()}
    mean = float(RATIOS.mean())
    assert got == {
        "ratio": round(mean, 6),
        "ratio_max": 5.0,
        "clip_low": round(1 / 12, 6),
        "clip_high": round(3 / 12, 6),
        "old_kl": round(mean - 1 - float(RATIOS.log().mean()), 6),
    }


def test_metrics_of_gspo_are_of_whole_sequences() -> None:
    mask = torch.ones(2, 2, dtype=torch.bool)
    logps = torch.tensor([[0.5, -0.5], [0.5, 0.5]])
    metrics = policy_metrics(logps, torch.zeros(2, 2), torch.ones(2, 1), mask, "gspo")
    assert float(metrics["clip_high"]) == 0.5
    assert float(metrics["ratio_max"]) == pytest.approx(math.exp(0.5))
    with pytest.raises(ConfigError, match=r"kind: got 'cispo'"):
        policy_metrics(logps, logps, torch.ones(2, 1), mask, "cispo")


SQUARE = torch.zeros(3, 3)
ONES = torch.ones(3, 3, dtype=torch.bool)
COLUMN = torch.ones(3, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"advantages": torch.ones(3)},
            r"advantages: got shape \(3,\), expected \(3, 3\) as the mask has, or \(3, 1\)",
        ),
        ({"advantages": torch.ones(1, 3)}, r"advantages: got shape \(1, 3\)"),
        ({"logps": torch.zeros(3, 2)}, r"logps: got shape \(3, 2\)"),
        ({"old_logps": torch.zeros(3, 1)}, r"old_logps: got shape \(3, 1\)"),
        ({"mask": ONES.float()}, r"mask: got torch\.float32"),
        ({"weight": torch.ones(3)}, r"weight: got shape \(3,\)"),
        ({"penalty": COLUMN}, r"penalty: got shape \(3, 1\), expected \(3, 3\)"),
        ({"kind": "trpo"}, r"kind: got 'trpo'"),
        ({"clip": (1.0, 0.2)}, r"clip\[0\]: got 1\.0"),
        ({"clip": (0.2, 1.0)}, r"clip\[1\]: got 1\.0"),
        ({"clip": (-0.1, 0.2)}, r"clip\[0\]: got -0\.1"),
        ({"delta": 1.2}, r"delta: got 1\.2, expected a number > 1 \+ clip"),
        ({"dual_clip": 1.0}, r"dual_clip: got 1\.0"),
        ({"dual_clip": 3.0, "delta": 3.0}, r"delta, dual_clip: got both"),
        ({"kind": "cispo", "clip": (0.2, 0.2)}, r"clip, dual_clip: got one with kind 'cispo'"),
        ({"kind": "cispo", "delta": 0.0}, r"delta: got 0\.0"),
        ({"kind": "sapo", "delta": 2.0}, r"delta: got 2\.0 with kind 'sapo'"),
        ({"kind": "gspo", "reduction": "token_mean"}, r"reduction: got 'token_mean' with kind 'gspo'"),
        ({"reduction": "dr_grpo"}, r"max_len: got None"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    arguments = {"logps": SQUARE, "old_logps": SQUARE, "advantages": COLUMN, "mask": ONES}
    with pytest.raises(ConfigError, match=message):
        policy_loss(**{**arguments, **options})
