"""KL estimators: values and gradients by hand, and in exact expectation over a three-token distribution."""

from __future__ import annotations

import pytest
import torch
from effml_rl.kl import KINDS, kl
from effml_shared.errors import ConfigError
from torch import Tensor

F64 = torch.float64
LOGPS = torch.tensor([[-1.0, -2.0, -0.5, -0.3]], dtype=F64)
REF = torch.tensor([[-1.2, -1.5, -0.7, -0.3]], dtype=F64)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("k1", [0.2, -0.5, 0.2, 0]),
        ("k2", [0.02, 0.125, 0.02, 0]),
        ("k3", [0.018731, 0.148721, 0.018731, 0]),
        ("k3+", [0.018731, 0.148721, 0.018731, 0]),
    ],
)
def test_values_by_hand(kind: str, expected: list[float]) -> None:
    torch.testing.assert_close(kl(LOGPS, REF, kind), torch.tensor([expected], dtype=F64), atol=1e-6, rtol=0)


class Exact:
    """The expectation over y ~ p, differentiated as samples are: the weights of the samples are constants."""

    def __init__(self) -> None:
        self.logits = torch.tensor([0.5, 0.3, 0.2], dtype=F64).log().requires_grad_()
        self.logps = self.logits.log_softmax(0).unsqueeze(0)
        self.p = self.logps.exp().detach()
        self.ref = torch.tensor([[0.2, 0.3, 0.5]], dtype=F64).log()

    def estimates(self, kind: str) -> Tensor:
        ratio = (self.logps - self.logps.detach()).exp() if kind == "k3_corrected" else None
        return kl(self.logps, self.ref, kind, ratio=ratio)

    def gradient(self, kind: str) -> Tensor:
        (gradient,) = torch.autograd.grad((self.p * self.estimates(kind)).sum(), self.logits)
        return gradient


@pytest.mark.parametrize(
    ("kind", "mean", "gradient"),
    [
        ("k1", 0.274887, (0, 0, 0)),
        ("k2", 0.293856, (0.320702, -0.082466, -0.238236)),
        ("k3", 0.274887, (0.3, 0, -0.3)),
        ("k3+", 0.274887, (0.320702, -0.082466, -0.238236)),
        ("k3_corrected", 0.274887, (0.320702, -0.082466, -0.238236)),
    ],
)
def test_exact_expectations(kind: str, mean: float, gradient: tuple[float, ...]) -> None:
    exact = Exact()
    assert abs(float((exact.p * exact.estimates(kind).detach()).sum()) - mean) < 1e-6
    torch.testing.assert_close(exact.gradient(kind), torch.tensor(gradient, dtype=F64), atol=1e-6, rtol=0)


def test_the_gradients_are_those_of_the_two_divergences() -> None:
    exact = Exact()
    forward = (exact.logps.exp() * (exact.logps - exact.ref)).sum()
    reverse = (exact.ref.exp() * (exact.ref - exact.logps)).sum()
    forward, reverse = (torch.autograd.grad(x, exact.logits, retain_graph=True)[0] for x in (forward, reverse))
    for kind in ("k2", "k3+", "k3_corrected"):
        torch.testing.assert_close(Exact().gradient(kind), forward, atol=1e-15, rtol=0)
    torch.testing.assert_close(Exact().gradient("k3"), reverse, atol=1e-15, rtol=0)


def test_variances() -> None:
    exact = Exact()
    for kind, variance in (("k1", 0.512149), ("k3", 0.042600)):
        values = exact.estimates(kind).detach()
        mean = (exact.p * values).sum()
        assert abs(float((exact.p * (values - mean) ** 2).sum()) - variance) < 1e-6


def test_the_corrected_form_is_unbiased_off_policy_too() -> None:
    exact = Exact()
    sampler = torch.tensor([[0.25, 0.25, 0.5]], dtype=F64)
    ratio = (exact.logps - sampler.log()).exp()
    total = (sampler * kl(exact.logps, exact.ref, "k3_corrected", ratio=ratio)).sum()
    assert abs(float(total.detach()) - 0.274887) < 1e-6
    (gradient,) = torch.autograd.grad(total, exact.logits)
    expected = torch.tensor([0.320702, -0.082466, -0.238236], dtype=F64)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [float("nan"), float("-inf"), 1e30])
def test_masked_slots_have_no_influence(kind: str, garbage: float) -> None:
    mask = torch.tensor([[True, True, False, False]])
    logps, ref = LOGPS.where(mask, garbage).requires_grad_(), REF.where(mask, torch.tensor(0.5, dtype=F64))
    ratio = LOGPS.exp().where(mask, garbage) if kind == "k3_corrected" else None
    result = kl(logps, ref, kind, mask=mask, ratio=ratio)
    result.sum().backward()
    assert logps.grad is not None
    assert result[0, 2:].tolist() == logps.grad[0, 2:].tolist() == [0.0, 0.0]
    assert bool(result.isfinite().all() and logps.grad.isfinite().all())


@pytest.mark.parametrize("kind", ["k3", "k3+"])
def test_extreme_differences_stay_finite(kind: str) -> None:
    logps = torch.tensor([[-1e4, -1e-4]], requires_grad=True)
    result = kl(logps, logps.detach().flip(1), kind)
    result.sum().backward()
    assert logps.grad is not None
    assert bool(result.isfinite().all() and logps.grad.isfinite().all())


def test_half_precision_is_widened_and_the_reference_gets_no_gradient() -> None:
    ref = REF.bfloat16().requires_grad_()
    result = kl(LOGPS.bfloat16().requires_grad_(), ref, "k3")
    result.sum().backward()
    assert result.dtype == torch.float32
    assert ref.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "k4"}, r"kind: got 'k4'"),
        ({"kind": "k3_corrected"}, r"ratio: got none"),
        ({"kind": "k3", "ratio": LOGPS}, r"ratio: got one"),
        ({"kind": "k3_corrected", "ratio": LOGPS[:, :1]}, r"ratio: got shape \(1, 1\)"),
        ({"mask": torch.ones(1, 3, dtype=torch.bool)}, r"mask: got shape \(1, 3\)"),
    ],
)
def test_bad_input_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kl(LOGPS, REF, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"ref_logps"):
        kl(LOGPS, REF[0])
