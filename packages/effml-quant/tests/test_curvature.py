"""Estimates of the Gauss-Newton diagonal against the matrix itself, and the factor N in each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from effml_quant.lotion.curvature import (
    AdamMoment,
    Curvature,
    EmpiricalFisher,
    GaussNewton,
    MicrobatchDifference,
    make_curvature,
    per_example_squares,
    sampled_cross_entropy,
)
from effml_shared.errors import CheckpointError, ConfigError
from effml_shared.tree import flatten, unflatten
from torch import Tensor, nn


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, W = draw(64, 3), nn.Parameter(draw(4, 3, seed=1))  # softmax regression: 64 examples, 4 classes
P = (X @ W.detach().T).softmax(-1)
EXACT = (P * (1 - P)).T @ X.square() / 64


def weights(*shapes: tuple[int, ...]) -> dict[str, nn.Parameter]:
    return {f"w{i}": nn.Parameter(draw(*shape, seed=i)) for i, shape in enumerate(shapes)}


def known(curvature: Curvature, name: str) -> Tensor:
    found = curvature.diagonal(name)
    assert found is not None
    return found[0] * found[1]


def test_sampled_labels_are_unbiased_for_gauss_newton() -> None:
    draws = 4000
    copies = W.detach().expand(draws, 4, 3).clone().requires_grad_()
    loss, count = sampled_cross_entropy(X @ copies.mT, torch.Generator().manual_seed(0))
    assert int(count) == draws * 64
    (gradient,) = torch.autograd.grad(loss, copies)
    estimates = 64 * (draws * gradient).square()  # each draw's own mean has 64 terms
    error = estimates.std(0) / draws**0.5
    assert bool(((estimates.mean(0) - EXACT).abs() < 3.5 * error).all())
    assert bool((error / EXACT < 0.03).all())
    assert bool((estimates.mean(0) / 64 < 0.02 * EXACT).all())  # without the factor N there is nothing left


def test_gnb_takes_the_closures_count() -> None:
    def closure() -> tuple[Tensor, Tensor]:
        mask = torch.arange(64) < 48
        return sampled_cross_entropy(X @ W.T, torch.Generator().manual_seed(3), mask)

    curvature = GaussNewton({"w": W}, 0.9, closure)
    assert curvature.diagonal("w") is None
    W.grad = None
    curvature.update(["w"], 7)  # the number of terms of the ordinary gradient is no matter
    assert W.grad is None
    loss, count = closure()
    (gradient,) = torch.autograd.grad(loss, W)
    assert int(count) == 48
    torch.testing.assert_close(known(curvature, "w"), 48 * gradient.square())


def test_sampled_labels_follow_the_model() -> None:
    logits = torch.tensor([0.0, 2.0, -1.0]).expand(20_000, 3)
    loss, _ = sampled_cross_entropy(logits, torch.Generator().manual_seed(0))
    entropy = torch.distributions.Categorical(logits=logits[0]).entropy()
    assert float(loss) == pytest.approx(float(entropy), rel=0.03)
    assert float(sampled_cross_entropy(logits, mask=torch.zeros(20_000, dtype=torch.bool))[0]) == 0


def test_empirical_fisher_is_a_bias_corrected_average() -> None:
    named = weights((5, 3), (7,))
    curvature = EmpiricalFisher(named, 0.9)
    expected = {name: torch.zeros_like(w) for name, w in named.items()}
    for step, n in enumerate((10, 20, 30)):
        for name, w in named.items():
            w.grad = draw(*w.shape, seed=step)
            expected[name] = 0.9 * expected[name] + 0.1 * n * w.grad.square()
        curvature.update(named, n)
    for name in named:
        torch.testing.assert_close(known(curvature, name), expected[name] / (1 - 0.9**3))


def test_average_in_pieces_and_other_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("effml_quant.lotion.curvature.PIECE", 4)
    for dtype in (torch.float32, torch.bfloat16):
        w = nn.Parameter(draw(6, 5).to(dtype).T)  # not contiguous
        w.grad = draw(5, 6, seed=1).to(dtype)
        curvature = EmpiricalFisher({"w": w}, 0.5)
        curvature.update(["w"], 8)
        assert known(curvature, "w").dtype == torch.float32
        torch.testing.assert_close(known(curvature, "w"), 8 * w.grad.float().square())


def test_per_example_squares() -> None:
    labels = torch.arange(64) % 4

    def loss(parameters: dict[str, Tensor], example: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(parameters["w"] @ example[0], example[1])

    found = per_example_squares(loss, {"w": W}, (X, labels))["w"]
    residual = P - F.one_hot(labels, 4)
    torch.testing.assert_close(found, residual.square().T @ X.square() / 64)
    curvature = make_curvature("per_example", {"w": W}, 0.9, lambda: {"w": found})
    curvature.update(["w"], 1)
    torch.testing.assert_close(known(curvature, "w"), found)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_moment(optimizer: Any) -> None:
    w = nn.Parameter(draw(4, 3))
    curvature = AdamMoment({"w": w})
    trained = optimizer([w], lr=0.1, betas=(0.9, 0.8))
    curvature.read(trained)
    assert curvature.diagonal("w") is None  # before its first step
    moment = torch.zeros(4, 3, dtype=torch.float64)
    for step in range(3):
        w.grad = draw(4, 3, seed=step)
        moment = 0.8 * moment + 0.2 * w.grad.square()
        trained.step()
    curvature.update(["w"], 50)
    torch.testing.assert_close(known(curvature, "w"), 50 * moment / (1 - 0.8**3))
    assert curvature.state_dict() == {"averages": {}, "updates": {}}


@pytest.mark.parametrize("scaled", [False, True], ids=["means", "sums"])
def test_microbatch_difference(scaled: bool) -> None:
    """Micro-batches 0 and 2 against 1 and 3, whether losses are parts of a mean or sums that are divided later."""
    w, n = nn.Parameter(draw(3)), 64
    curvature = MicrobatchDifference({"w": w}, 0.9)
    parts = X.split(16)
    for step in range(2):
        w.grad = None
        for part in parts:
            loss = (part @ w).square().sum() / 2
            (loss if scaled else loss / n).backward()
            torch.autograd.grad((part @ w).sum(), w)  # somebody looks at gradients: no micro-batch
        assert w.grad is not None
        if scaled:
            w.grad /= n
        curvature.update(["w"], n)
        curvature.clear(["w"])
        a, b = (torch.cat(parts[i::2]) for i in (0, 1))
        halves = [(half.T @ (half @ w.detach())) / 32 for half in (a, b)]
        expected = n / 4 * (halves[0] - halves[1]).square()
        torch.testing.assert_close(known(curvature, "w"), expected, rtol=1e-9, atol=1e-12)
        assert step == 0 or not torch.equal(w.grad, torch.zeros_like(w))


def test_microbatch_difference_drops_the_mean_gradient() -> None:
    """The mean over many steps is the variance of a term, where N grad^2 also holds N times the squared mean."""
    steps, n = 4000, 32
    terms = 2 + draw(steps, n, 1)
    halves = terms[:, ::2].mean(1) - terms[:, 1::2].mean(1)
    assert float((n / 4 * halves.square()).mean()) == pytest.approx(1, abs=0.08)
    assert float((n * terms.mean(1).square()).mean()) == pytest.approx(1 + 4 * n, rel=0.02)


def test_microbatch_difference_needs_pairs() -> None:
    w = nn.Parameter(draw(3))
    curvature = MicrobatchDifference({"w": w}, 0.9)
    (X @ w).sum().backward()
    with pytest.raises(ConfigError, match=r"curvature: got 1 micro-batches in a step, expected an even number"):
        curvature.update(["w"], 64)


def test_exact() -> None:
    named = weights((2, 2))
    given = {"w0": torch.ones(2, 2)}
    assert torch.equal(known(make_curvature("exact", named, 0.9, given), "w0"), given["w0"])
    curvature = make_curvature("exact", named, 0.9, lambda: given)
    assert curvature.diagonal("w0") is None
    curvature.update(["w0"], 1)
    assert torch.equal(known(curvature, "w0"), given["w0"])
    with pytest.raises(ConfigError, match=r"source: got shape \(2,\) for w0, expected a tensor of shape \(2, 2\)"):
        make_curvature("exact", named, 0.9, {"w0": torch.ones(2)}).diagonal("w0")


def test_state_travels() -> None:
    named = weights((5, 3))
    one, other = EmpiricalFisher(named, 0.9), EmpiricalFisher(named, 0.9)
    for step in range(4):
        named["w0"].grad = draw(5, 3, seed=step)
        one.update(named, 10)
        if step == 1:
            tensors, skeleton = flatten(one.state_dict())
            other.load_state_dict(unflatten(skeleton, {name: t.clone() for name, t in tensors.items()}))
        if step > 1:
            other.update(named, 10)
    assert torch.equal(known(one, "w0"), known(other, "w0"))
    with pytest.raises(CheckpointError, match=r"got curvature of w0, \(5, 3\)"):
        EmpiricalFisher(weights((5, 4)), 0.9).load_state_dict(one.state_dict())


def test_bad_arguments() -> None:
    named = weights((2, 2))
    with pytest.raises(ConfigError, match=r"source: got NoneType, expected a function for curvature='gnb'"):
        make_curvature("gnb", named, 0.9)
    with pytest.raises(ConfigError, match=r"source: got NoneType, expected tensors by name"):
        make_curvature("exact", named, 0.9)
    with pytest.raises(ConfigError, match=r"source: got dict, expected None"):
        make_curvature("empirical_fisher", named, 0.9, {})
    with pytest.raises(ConfigError, match=r"curvature: got 'adam' with SGD"):
        AdamMoment(named).read(torch.optim.SGD(named.values(), lr=0.1))
    with pytest.raises(ConfigError, match=r"curvature: got 'adam' without an optimizer"):
        AdamMoment(named).diagonal("w0")
