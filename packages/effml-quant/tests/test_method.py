"""LOTION in training loops: what it adds and nothing else, in every loop the same, resumed, and effective."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from effml_quant import Quantizer
from effml_quant.lotion import Lotion, LotionConfig
from effml_quant.lotion.penalty import penalty_gradient
from effml_quant.lotion.variance import cast, randomized_round
from effml_shared.errors import CheckpointError, ConfigError, NonFiniteError
from effml_shared.schedules import Plan
from effml_shared.steps import GradientStep
from effml_shared.tree import flatten, unflatten
from torch import Tensor, nn

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}
WIDTHS = ("0.weight", "2.weight")


def model(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(32, 6, generator=torch.Generator().manual_seed(step)).to(dtype)


def loss(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - x[:, :3].sin()).square().mean(1).sum()


def train(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = 6,
    start: int = 0,
    between: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
    parts: int = 1,
) -> nn.Module:
    dtype = next(net.parameters()).dtype
    for step in range(start, steps):
        optimizer.zero_grad()
        for part in batch(step, dtype).chunk(parts):
            (loss(net, part) / 32).backward()
        between()
        optimizer.step()
        after()
    return net


def same(one: nn.Module, other: nn.Module, rtol: float = 0.0) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.05])
def test_without_strength_nothing_changes(name: str, clip: float | None) -> None:
    net, plain = model(), model()
    optimizer, other = OPTIMIZERS[name](net.parameters()), OPTIMIZERS[name](plain.parameters())
    Lotion(net, LotionConfig(strength=0.0)).attach(optimizer, 32, clip)
    clipping = (lambda: None) if clip is None else lambda: nn.utils.clip_grad_norm_(plain.parameters(), clip)
    same(train(net, optimizer), train(plain, other, between=clipping))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("curvature", ["empirical_fisher", "microbatch_difference", "adam"])
def test_attached_is_the_bare_loop(name: str, curvature: str) -> None:
    if (name, curvature) == ("SGD", "adam"):
        return
    config = LotionConfig("fp4", "channel", curvature=curvature)
    net, other = model(), model()
    one, two = OPTIMIZERS[name](net.parameters()), OPTIMIZERS[name](other.parameters())
    Lotion(net, config).attach(one, n_terms=32, clip_norm=0.5)
    by_hand = Lotion(other, config)
    if curvature == "adam":
        by_hand.curvature.read(two)  # type: ignore[attr-defined]

    def between() -> None:
        by_hand.accumulate(32)
        nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        by_hand.add_penalty_()

    same(train(net, one, parts=2), train(other, two, between=between, parts=2))
    assert by_hand.penalty() > 0


def test_what_is_added_is_the_penaltys_gradient() -> None:
    net = model(dtype=torch.float64)
    lotion = Lotion(net, LotionConfig("int3", strength=0.7, beta=0.5))
    for step in range(2):
        net.zero_grad()
        (loss(net, batch(step, torch.float64)) / 32).backward()
        lotion.accumulate(32)
    before = {name: p.grad.clone() for name, p in net.named_parameters()}  # type: ignore[union-attr]
    lotion.add_penalty_()
    expected = torch.autograd.grad(lotion.penalty(), list(lotion.weights.values()))
    for (name, weight), gradient in zip(lotion.weights.items(), expected, strict=True):
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad - before[name], gradient, rtol=1e-9, atol=1e-12)
    assert torch.equal(net[0].bias.grad, before["0.bias"])
    metrics: dict[str, float] = {}
    lotion.on_step(None, metrics)  # type: ignore[arg-type]
    assert metrics["penalty"] == pytest.approx(lotion.penalty().item(), rel=1e-9)


@pytest.mark.parametrize("curvature", ["empirical_fisher", "microbatch_difference"])
def test_accumulation_changes_nothing(curvature: str) -> None:
    found = []
    for parts in (2, 4, 8):
        net = model(dtype=torch.float64)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        lotion = Lotion(net, LotionConfig("int3", curvature=curvature))
        lotion.attach(optimizer, 32)
        found.append(train(net, optimizer, parts=parts))
        if curvature == "microbatch_difference":
            return  # its halves are other samples with other parts
    same(found[0], found[1], rtol=1e-12)
    same(found[0], found[2], rtol=1e-12)


def test_in_a_gradient_step_with_counted_terms() -> None:
    """Sums divided by the global count, whatever the micro-batch, are the bare loop's means."""
    net, other = model(dtype=torch.float64), model(dtype=torch.float64)
    one, two = OPTIMIZERS["AdamW"](net.parameters()), OPTIMIZERS["AdamW"](other.parameters())
    lotion = Lotion(net, LotionConfig("int4"))
    counted = lotion.counting(lambda m, x: (loss(m, x), torch.tensor(len(x))))
    lotion.attach(one, clip_norm=0.5)
    Lotion(other, LotionConfig("int4")).attach(two, 32, clip_norm=0.5)
    step = GradientStep(net, one, counted, micro_batch=8)
    for i in range(5):
        metrics = step(batch(i, torch.float64), Plan(lr_factor=1.0, batch_size=32))
        step.evaluate([batch(9, torch.float64)])  # counts for nothing
        assert metrics["tokens"] == 32
    same(net, train(other, two, steps=5), rtol=1e-12)


@pytest.mark.parametrize("curvature", ["empirical_fisher", "microbatch_difference"])
def test_a_skipped_step_leaves_nothing_behind(curvature: str) -> None:
    """A loop that meets an infinite gradient drops it, as a GradScaler does, and goes on with the next batch."""
    net, other = model(dtype=torch.float64), model(dtype=torch.float64)
    one, two = OPTIMIZERS["SGD"](net.parameters()), OPTIMIZERS["SGD"](other.parameters())
    lotion, clean = (Lotion(m, LotionConfig("int3", curvature=curvature)) for m in (net, other))
    counted = lotion.counting(lambda m, x: (loss(m, x), torch.tensor(len(x))))
    lotion.attach(one)
    clean.attach(two, 32)
    step = GradientStep(net, one, counted, micro_batch=16)
    plan = Plan(lr_factor=1.0, batch_size=32)

    def penalty(of: Lotion) -> float | None:
        metrics: dict[str, float] = {}
        of.on_step(None, metrics)  # type: ignore[arg-type]
        return metrics.get("penalty")

    for i in range(4):
        if i == 2:
            bad = torch.full((16, 6), torch.inf, dtype=torch.float64)
            with pytest.raises(NonFiniteError):
                step(bad, plan)
            assert penalty(lotion) is None
        step(batch(i, torch.float64), plan)
        train(other, two, start=i, steps=i + 1, parts=2)
        assert penalty(lotion) == pytest.approx(penalty(clean), rel=1e-12)
    same(net, other, rtol=1e-12)


def test_loss_scaling_changes_nothing() -> None:
    net, other = model(dtype=torch.float64), model(dtype=torch.float64)
    one, two = OPTIMIZERS["SGD"](net.parameters()), OPTIMIZERS["SGD"](other.parameters())
    Lotion(net, LotionConfig("int3")).attach(one, 32)
    Lotion(other, LotionConfig("int3")).attach(two, 32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        one.zero_grad()
        scaler.scale(loss(net, batch(step, torch.float64)) / 32).backward()
        scaler.step(one)
        scaler.update()
    same(net, train(other, two, steps=4), rtol=1e-12)


def test_decoupled() -> None:
    net, plain = model(dtype=torch.float64), model(dtype=torch.float64)
    one, other = OPTIMIZERS["AdamW"](net.parameters()), OPTIMIZERS["AdamW"](plain.parameters())
    lotion = Lotion(net, LotionConfig("int3", coupled=False, strength=2.0))
    lotion.attach(one, 32)
    train(net, one, steps=1)
    train(plain, other, steps=1)
    for name, weight in lotion.weights.items():
        g, factor = lotion.curvature.diagonal(name)  # type: ignore[misc]
        start = plain.get_parameter(name).detach()
        gradient, _ = penalty_gradient(start, g * factor, lotion.quantizer, 2.0)
        torch.testing.assert_close(weight.detach(), start - 0.01 * gradient, rtol=1e-12, atol=1e-15)
    with pytest.raises(ConfigError, match=r"coupled: got False, expected apply_penalty_\(optimizer\)"):
        lotion.add_penalty_()


def test_warmup_and_every() -> None:
    net = model()
    lotion = Lotion(net, LotionConfig(warmup=4, every=3))
    values, updates = [], []
    for step in range(7):
        net.zero_grad()
        (loss(net, batch(step)) / 32).backward()
        lotion.accumulate(32)
        updates.append(lotion.curvature.updates["0.weight"])
        whole = sum(row.gap for row in lotion.report())
        values.append(lotion.penalty().item() / whole)
    assert values == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1], rel=1e-5)
    assert updates == [1, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize(("correction", "told", "factor"), [("tokens", 64, 64), (10, None, 10), (None, 5, 1)])
def test_batch_correction(correction: Any, told: Any, factor: float) -> None:
    net = model()
    lotion = Lotion(net, LotionConfig(batch_correction=correction))
    loss(net, batch(0)).backward()
    lotion.accumulate(told)
    g, scale = lotion.curvature.diagonal("0.weight")  # type: ignore[misc]
    torch.testing.assert_close(g * scale, factor * net[0].weight.grad.square())


def test_gnb_every_few_steps() -> None:
    net = model()
    calls = []

    def closure() -> tuple[Tensor, int]:
        calls.append(1)
        return net(batch(0)).log_softmax(-1)[:, 0].mean(), 32

    lotion = Lotion(net, LotionConfig(curvature="gnb", every=2), source=closure)
    optimizer = OPTIMIZERS["SGD"](net.parameters())
    lotion.attach(optimizer, 32)
    train(net, optimizer, steps=5)
    assert len(calls) == 3


def test_tied_frozen_and_other_weights() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    net[2].weight = net[1].weight
    net[3].weight.requires_grad_(False)
    assert list(Lotion(net).weights) == ["1.weight"]
    assert list(Lotion(net, filter=lambda name, module: name == "0").weights) == ["0.weight"]
    assert list(Lotion([net[1].weight, net[2].weight]).weights) == ["0"]
    assert next(iter(Lotion(net.named_parameters()).weights)) == "0.weight"
    wrapped = nn.Module()
    wrapped._orig_mod = net  # as torch.compile does
    assert list(Lotion(wrapped).weights) == ["1.weight"]


@pytest.mark.parametrize("curvature", ["empirical_fisher", "microbatch_difference", "adam"])
def test_two_optimizers_each_with_its_weights(curvature: str) -> None:
    net, other = model(dtype=torch.float64), model(dtype=torch.float64)
    parts = [OPTIMIZERS["AdamW"](net[i].parameters()) for i in (0, 2)]
    whole = OPTIMIZERS["AdamW"](other.parameters())
    config = LotionConfig("int3", warmup=3, curvature=curvature)
    lotion, one = Lotion(net, config), Lotion(other, config)
    for part in parts:
        lotion.attach(part, 32)
    one.attach(whole, 32)

    class Both:
        def zero_grad(self) -> None:
            net.zero_grad()

        def step(self) -> None:
            for part in parts:
                part.step()

    same(train(net, Both(), parts=2), train(other, whole, parts=2))  # type: ignore[arg-type]
    metrics: list[dict[str, float]] = [{}, {}]
    lotion.on_step(None, metrics[0])  # type: ignore[arg-type]
    one.on_step(None, metrics[1])  # type: ignore[arg-type]
    assert metrics[0]["penalty"] == pytest.approx(metrics[1]["penalty"], rel=1e-12)


def test_wrapped_optimizers_and_detaching() -> None:
    class Wrapped:  # as accelerate's
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    net, plain = model(), model()
    optimizer, other = OPTIMIZERS["SGD"](net.parameters()), OPTIMIZERS["SGD"](plain.parameters())
    lotion = Lotion(net, LotionConfig("int2"))
    lotion.attach(Wrapped(optimizer), 32)  # type: ignore[arg-type]
    lotion.detach()
    same(train(net, optimizer), train(plain, other))
    lotion.attach(Wrapped(optimizer), 32)  # type: ignore[arg-type]
    train(net, optimizer, steps=7, start=6)
    assert lotion.penalty() > 0


def test_resumes_bit_by_bit() -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer, Lotion]:
        net = model()
        optimizer = OPTIMIZERS["AdamW"](net.parameters())
        lotion = Lotion(net, LotionConfig("int3", warmup=5, every=2))
        lotion.attach(optimizer, 32)
        return net, optimizer, lotion

    whole, optimizer, _ = make()
    train(whole, optimizer, steps=7)
    first, optimizer, lotion = make()
    train(first, optimizer, steps=3)
    state = {"net": first.state_dict(), "optimizer": optimizer.state_dict(), "lotion": lotion.state_dict()}
    tensors, skeleton = flatten(state)
    state = unflatten(skeleton, {name: t.clone() for name, t in tensors.items()})
    second, optimizer, lotion = make()
    second.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    lotion.load_state_dict(state["lotion"])
    same(whole, train(second, optimizer, steps=7, start=3))
    with pytest.raises(CheckpointError, match=r"0\.weight is not among both"):
        Lotion(nn.Sequential(nn.ReLU(), nn.Linear(2, 2))).load_state_dict(state["lotion"])


def test_bfloat16_weights_are_computed_in_float32() -> None:
    net = model(dtype=torch.bfloat16)
    lotion = Lotion(net, LotionConfig("int4"))
    loss(net, batch(0, torch.bfloat16)).backward()
    before = net[0].weight.grad.float()
    lotion.accumulate(32)
    lotion.add_penalty_()
    g, factor = lotion.curvature.diagonal("0.weight")  # type: ignore[misc]
    expected, _ = penalty_gradient(net[0].weight.float(), g, lotion.quantizer, factor)
    torch.testing.assert_close(net[0].weight.grad, (before + expected).bfloat16())


def test_models_and_optimizers_can_be_copied() -> None:
    net = model()
    lotion = Lotion(net, LotionConfig(curvature="empirical_fisher"))
    assert lotion.penalty() == 0
    train(net, optimizer := OPTIMIZERS["SGD"](net.parameters()), steps=1)
    same(net, copy.deepcopy(net))
    assert optimizer.state


def test_power_law_quadratic_over_ten_seeds() -> None:
    """Adam, int4 per tensor: seeds are rows, and so blocks, of one matrix. PTQ ends at the optimum itself."""
    d, steps = 300, 1500
    optima, starts = [], []
    for seed in range(10):
        torch.manual_seed(seed)
        optima.append(torch.randn(d).double())
        starts.append(0.1 * torch.randn(d).double())
    optimum, w = torch.stack(optima), nn.Parameter(torch.stack(starts))
    eigenvalues = torch.arange(1, d + 1, dtype=torch.float64) ** -1.1
    q = Quantizer("int4", granularity="channel")

    def excess(x: Tensor) -> Tensor:
        return 0.5 * (eigenvalues * (x - optimum).square()).sum(-1)

    optimizer = torch.optim.Adam([w], lr=0.1)
    config = LotionConfig("int4", "channel", curvature="exact")
    Lotion([w], config, source={"0": eigenvalues.expand_as(w)}).attach(optimizer, 1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        excess(w).sum().backward()
        optimizer.step()
        schedule.step()
    trained, untrained = excess(cast(w.detach(), q)), excess(cast(optimum, q))
    torch.testing.assert_close(
        untrained[:3], torch.tensor([0.0605, 0.0563, 0.0465], dtype=torch.float64), rtol=0, atol=6e-5
    )
    assert trained[:3].tolist() == pytest.approx([0.0225, 0.0251, 0.0222], rel=0.06)
    assert bool((trained <= 1.01 * untrained).all())
    assert float((trained / untrained).median()) <= 0.75
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([excess(randomized_round(w.detach(), q, generator)) for _ in range(20)]).mean(0)
    assert bool((drawn <= 1.02 * trained).all())  # the weights lie on the grid


def test_bad_arguments() -> None:
    net = model()
    lotion, optimizer = Lotion(net), OPTIMIZERS["SGD"](net.parameters())
    with pytest.raises(ConfigError, match=r"0\.weight: got no gradient"):
        lotion.accumulate(32)
    loss(net, batch(0)).backward()
    with pytest.raises(ConfigError, match=r"0\.weight: got a penalty before any curvature, expected accumulate"):
        lotion.add_penalty_()
    for n in (0, -3, None, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=rf"n_terms: got {n}, expected"):
            lotion.accumulate(n)
    with pytest.raises(ConfigError, match=r"clip_norm: got 0"):
        lotion.attach(optimizer, 32, clip_norm=0)
    with pytest.raises(ConfigError, match=r"optimizer: got one that trains none"):
        lotion.attach(torch.optim.SGD([net[0].bias], lr=1), 32)
    with pytest.raises(ConfigError, match=r"curvature: got 'adam' with SGD"):
        Lotion(net, LotionConfig(curvature="adam")).attach(optimizer, 32)
    lotion.attach(optimizer, 32)
    with pytest.raises(ConfigError, match=r"got step\(closure\)"):
        optimizer.step(lambda: 0.0)
    net[0].weight.grad = torch.eye(16, 6).to_sparse()
    with pytest.raises(ConfigError, match=r"0\.weight: got a gradient of layout torch\.sparse_coo"):
        lotion.accumulate(32)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_curvature_that_is_not_finite(bad: float) -> None:
    net = model()
    lotion = Lotion(net)
    loss(net, batch(0)).backward()
    net[2].weight.grad[0, 0] = bad
    lotion.accumulate(32)
    with pytest.raises(NonFiniteError, match=r"2\.weight: got a penalty that is not finite"):
        lotion.add_penalty_()
