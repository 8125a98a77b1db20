"""The noise scale against stored gradients and a known covariance, in the loop and in loops of other people."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from effml_optim.noise_scale import NoiseScaleMonitor
from effml_shared import distributed
from effml_shared.errors import ConfigError
from effml_shared.loop import Budget, Loop
from effml_shared.runs import Run, Trial
from effml_shared.schedules import Clock, Plan
from effml_shared.steps import GradientStep
from torch import Tensor, nn

F64 = torch.float64


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(F64)


def rows(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, dtype=F64, generator=torch.Generator().manual_seed(seed))


def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return ((model(x).squeeze(-1) - x.sum(1)) ** 2).sum(), torch.tensor(len(x))


def accumulate(model: nn.Module, micro_batches: list[Tensor], scale: float = 1.0) -> None:
    model.zero_grad(set_to_none=True)
    for x in micro_batches:
        (scale * loss(model, x)[0]).backward()


def stored(model: nn.Module, micro_batches: list[Tensor]) -> list[Tensor]:
    """Return each micro-batch's gradient as one vector."""
    vectors = []
    for x in micro_batches:
        vectors.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss(model, x)[0], model.parameters())]))
    return vectors


def naive(gradients: list[Tensor], size: int) -> float:
    """Return B_simple from k gradients of `size` samples each, as the textbook has it."""
    k, mean = len(gradients), torch.stack(gradients).mean(0)
    spread = float(torch.stack([g @ g for g in gradients]).mean() - mean @ mean) * k / (k - 1)
    return spread * size / (float(mean @ mean) - spread / k)


@pytest.mark.parametrize("scale", [1.0, 1 / 12, 1024.0])
def test_equals_the_naive_formula_from_stored_gradients(scale: float) -> None:
    model, micro_batches = mlp(), list(rows(12).split(4))
    expected = naive(stored(model, micro_batches), 4)
    with NoiseScaleMonitor(model.parameters(), 4, decay=0.0) as monitor:
        accumulate(model, micro_batches, scale)
        monitor.update()
    assert monitor.b_simple == pytest.approx(expected, rel=1e-10)
    assert monitor.variance_share(7) == pytest.approx(expected / (expected + 7), rel=1e-10)


def test_numerator_and_denominator_are_averaged_apart() -> None:
    model, steps = mlp(), [list(rows(8, seed).split(2)) for seed in range(3)]
    averages = torch.zeros(2, dtype=F64)
    with NoiseScaleMonitor(model.parameters(), 2, decay=0.7) as monitor:
        for micro_batches in steps:
            accumulate(model, micro_batches)
            monitor.update(8)
            gradients = torch.stack(stored(model, micro_batches)) / 2
            spread = gradients.var(0).sum()
            parts = torch.stack([2 * spread, gradients.mean(0).square().sum() - spread / 4])
            averages = 0.7 * averages + 0.3 * parts
    assert monitor.b_simple == pytest.approx(float(averages[0] / averages[1]), rel=1e-10)


@pytest.mark.parametrize("sizes", [[4, 4, 4], [4, 4, 1], [4, 1]])
def test_both_parts_are_unbiased_also_with_a_smaller_last_micro_batch(sizes: list[int]) -> None:
    """Sample gradients of sum_i |w - x_i|^2 / 2 have mean w - mu and the covariance of x."""
    generator = torch.Generator().manual_seed(0)
    deviations, mu = torch.tensor([1.0, 2.0, 0.5], dtype=F64), torch.tensor([0.3, -0.2, 1.0], dtype=F64)
    weight = nn.Parameter(torch.zeros(3, dtype=F64))
    estimates = []
    with NoiseScaleMonitor([weight], 4, decay=0.0) as monitor:
        for _ in range(600):
            weight.grad = None
            for size in sizes:
                x = mu + deviations * torch.randn(size, 3, dtype=F64, generator=generator)
                (weight - x).square().sum().mul(0.5).backward()
            monitor.update(sum(sizes))
            estimates.append(list(monitor.state_dict().values()))
    found = torch.tensor(estimates, dtype=F64)
    error = found.mean(0) - torch.stack([deviations.square().sum(), mu.square().sum()])
    assert (error.abs() < 4 * found.std(0) / math.sqrt(len(found))).all()


class Rows:
    """Endless data for the loop."""

    def __init__(self) -> None:
        self.position = 0

    def next(self, batch_size: int) -> Tensor:
        self.position += batch_size
        return 1 + rows(batch_size, seed=self.position)

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def growing(clock: Clock) -> Plan:
    return Plan(5 + clock.step)


def train(run: Run, *budgets: int, micro_batch: int = 2) -> NoiseScaleMonitor:
    """Train for so many steps; each further budget starts from the checkpoint alone."""
    model = mlp()
    step = GradientStep(model, torch.optim.SGD(model.parameters(), lr=0.01), loss, micro_batch=2, clip_norm=0.5)
    with NoiseScaleMonitor(model.parameters(), micro_batch) as monitor:

        def body(trial: Trial) -> dict[str, Any]:
            for steps in budgets:
                monitor.load_state_dict({"trace": 0.0, "mean": 0.0})
                hooks = [monitor, *trial.hooks]
                budget = Budget(steps=steps)
                Loop(step, Rows(), growing, budget=budget, hooks=hooks, checkpoints=trial.checkpoints).run()
            return {}

        run.trial("SGD/seed=0", body)
    return monitor


def untimed(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in run.metrics()]


def test_a_run_records_it_and_a_resumed_one_the_same(tmp_path: Path) -> None:
    manifest = {"experiment": "none", "preset": "smoke"}
    whole, parts = (Run.create(tmp_path / name, manifest, "") for name in ("whole", "parts"))
    monitor = train(whole, 5)
    train(parts, 2, 5)
    assert untimed(whole) == untimed(parts)
    first, *_, last = whole.metrics()
    assert last["noise_scale"] == monitor.b_simple
    assert last["variance_share"] == monitor.variance_share(9)

    x = Rows().next(5)  # of the first step: micro-batches of 2, 2 and 1 samples
    squares = sum(float(g @ g) for g in stored(mlp(), list(x.split(2))))
    (gradient,) = stored(mlp(), [x])
    mean = (float(gradient @ gradient) - squares) / 16
    assert first["noise_scale"] == pytest.approx((squares - 9 * mean) / 5 / mean, rel=1e-10)


def test_another_micro_batch_than_the_steps_is_refused(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {"experiment": "none", "preset": "smoke"}, "")
    with pytest.raises(ConfigError, match="micro_batch: got 4, but the gradient of 5 samples came in 3 passes"):
        train(run, 1, micro_batch=4)


def test_one_micro_batch_says_nothing_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    with NoiseScaleMonitor(model.parameters(), 4) as monitor, caplog.at_level(logging.WARNING):
        for _ in range(3):
            accumulate(model, [rows(4)])
            monitor.update()
        monitor.update()  # nothing was accumulated at all
    assert math.isnan(monitor.b_simple)
    assert math.isnan(monitor.variance_share(8))
    assert len(caplog.records) == 1


def test_frozen_and_unused_parameters_infinite_gradients_and_other_uses_of_autograd() -> None:
    model = mlp()
    model[0].bias.requires_grad_(False)
    unused = nn.Parameter(torch.ones(2, dtype=F64))
    with NoiseScaleMonitor([*model.parameters(), unused], 4) as monitor:
        accumulate(model, list(rows(8).split(4)))
        weights = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(loss(model, rows(3))[0], weights)
        monitor.update()
        before = monitor.state_dict()
        accumulate(model, [rows(4), math.inf * rows(4)])
        monitor.update()
    assert monitor.state_dict() == before
    assert 0 < monitor.b_simple < math.inf


def test_half_precision_parameters_are_measured_in_single_precision() -> None:
    wide = nn.Linear(64, 1, bias=False)
    narrow = copy.deepcopy(wide).bfloat16()
    x = 1 + torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    with NoiseScaleMonitor(wide.parameters(), 4) as reference, NoiseScaleMonitor(narrow.parameters(), 4) as monitor:
        for part in x.split(4):
            wide(part).sum().backward()
            narrow(part.bfloat16()).sum().backward()
        reference.update()
        monitor.update()
    assert monitor.b_simple == pytest.approx(reference.b_simple, rel=0.05)
    assert narrow.weight.grad is not None
    assert narrow.weight.grad.dtype == torch.bfloat16


def test_closing_leaves_the_model_as_it_was() -> None:
    model = mlp()
    monitor = NoiseScaleMonitor(model.parameters(), 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = optimizer.register_step_post_hook(lambda *_: monitor.update())
    accumulate(model, list(rows(8).split(4)))
    optimizer.step()
    reading = monitor.b_simple
    assert reading > 0
    monitor.close()
    handle.remove()
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    accumulate(model, list(rows(8, seed=2).split(4)))
    monitor.update()
    assert monitor.b_simple == reading


def test_state_travels() -> None:
    model = mlp()
    first, second = (NoiseScaleMonitor(model.parameters(), 4) for _ in range(2))
    accumulate(model, list(rows(8).split(4)))
    first.update()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.b_simple == first.b_simple


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp_shows_a_rank_its_own_gradients_before_they_are_reduced() -> None:
    model, micro_batches = mlp(), list(rows(12).split(4))
    expected = naive(stored(model, micro_batches), 4)
    parallel = nn.parallel.DistributedDataParallel(model)

    def ruin(state, bucket):  # type: ignore[no-untyped-def]
        future = torch.futures.Future()  # type: ignore[var-annotated]
        future.set_result(torch.zeros_like(bucket.buffer()))
        return future

    parallel.register_comm_hook(None, ruin)
    with NoiseScaleMonitor(parallel.parameters(), 4) as monitor:
        with parallel.no_sync():
            for x in micro_batches[:-1]:
                loss(parallel, x)[0].backward()
        loss(parallel, micro_batches[-1])[0].backward()
        monitor.update()
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)
    assert monitor.b_simple == pytest.approx(expected, rel=1e-10)


def test_readings_are_of_all_ranks_and_each_knows_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks, one after the other: 7 samples, dealt as 3 and 4, in micro-batches of 2."""
    model, states = mlp(), []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank, share in enumerate(rows(7).split([3, 4])):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "reduce_sum", lambda *values: list(values))
        with NoiseScaleMonitor(model.parameters(), 2, decay=0.0) as monitor:
            accumulate(model, list(share.split(2)))
            monitor.update(7)
        states.append([monitor._trace, monitor._mean])
        gradients = stored(model, list(share.split(2)))
        assert monitor._mean == pytest.approx(float(2 * gradients[0] @ gradients[1]) / (4 if rank == 0 else 8))
    trace, mean = map(sum, zip(*states, strict=True))
    monkeypatch.setattr(distributed, "reduce_sum", lambda *values: [trace, mean])
    assert monitor.b_simple == (trace / mean if mean > 0 else math.inf)
    assert monitor.state_dict() == {"trace": trace / 2, "mean": mean / 2}


def test_wrong_arguments_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = list(mlp().parameters())
    with pytest.raises(ConfigError, match="micro_batch: got 0"):
        NoiseScaleMonitor(parameters, 0)
    with pytest.raises(ConfigError, match="decay: got 1"):
        NoiseScaleMonitor(parameters, 4, decay=1)
    with pytest.raises(ConfigError, match="parameters: got none"):
        NoiseScaleMonitor([], 4)
    monkeypatch.setattr(distributed, "is_sharded", lambda tensor: True)
    with pytest.raises(ConfigError, match="parameters: got a sharded one"):
        NoiseScaleMonitor(parameters, 4)
