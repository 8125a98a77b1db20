"""The scheduler and the sampler against the plan they show, in a bare loop, on simulated ranks, and with accelerate."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from effml_optim.seesaw.plan import SeesawPlan
from effml_optim.seesaw.training import SeesawBatchSampler, SeesawScheduler, split
from effml_shared.data.loader import Loader
from effml_shared.errors import CheckpointError, ConfigError, DataError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

PLAN = SeesawPlan.from_cosine(500, 40, 8, alpha=1.5, unit=4)


def make_optimizer(lr: float | Tensor = 0.1, **options: Any) -> torch.optim.Optimizer:
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    return torch.optim.AdamW([{"params": [weights[0]]}, {"params": [weights[1]], "lr": 0.03}], lr=lr, **options)


def make_scheduler(optimizer: torch.optim.Optimizer | None = None, **options: Any) -> SeesawScheduler:
    return SeesawScheduler(optimizer or make_optimizer(), PLAN, **{"micro_batch": 4, **options})


# The scheduler.


def test_the_scheduler_shows_the_plan() -> None:
    scheduler = make_scheduler()
    trace = []
    while not scheduler.finished:
        step = PLAN.at(scheduler.samples)
        assert scheduler.batch_size == step.batch_size
        assert scheduler.accumulation_steps == math.ceil(step.batch_size / 4)
        assert scheduler.get_last_lr() == [0.1 * step.lr_factor, 0.03 * step.lr_factor]
        trace.append((scheduler.samples, scheduler.batch_size, scheduler.get_last_lr()[0] / 0.1))
        scheduler.optimizer.step()
        scheduler.step()
    assert (scheduler.samples, scheduler.steps) == (500, PLAN.total_steps)
    assert (scheduler.batch_size, scheduler.accumulation_steps) == (0, 0)
    starts = [(row, row.first_sample + i * row.batch_size) for row in PLAN.rows for i in range(row.steps)]
    assert [(n, batch) for n, batch, _ in trace] == [(n, row.batch_size) for row, n in starts]
    assert all(lr == pytest.approx(row.lr) for (row, n), (*_, lr) in zip(starts, trace, strict=True) if n >= 40)
    with pytest.raises(ConfigError, match="step: got one after the last of 500 samples, expected the loop to end"):
        scheduler.step()


def test_tensor_learning_rates_are_filled_in_place() -> None:
    optimizer = make_optimizer(torch.tensor(0.1))
    tensor = optimizer.param_groups[0]["lr"]
    scheduler = make_scheduler(optimizer)
    scheduler.step(48)
    assert optimizer.param_groups[0]["lr"] is tensor
    assert float(tensor) == pytest.approx(0.1 * PLAN.at(48).lr_factor)
    assert isinstance(optimizer.param_groups[0]["initial_lr"], float)


def test_a_peak_that_another_scheduler_noted_is_kept() -> None:
    optimizer = make_optimizer()
    torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=5)
    assert make_scheduler(optimizer).get_last_lr() == [0.1 * PLAN.at(0).lr_factor, 0.03 * PLAN.at(0).lr_factor]


def test_betas_and_weight_decay_start_from_their_initial_values() -> None:
    optimizer = make_optimizer(betas=(0.9, 0.95), weight_decay=0.1)
    scheduler = make_scheduler(optimizer, rescale_betas=True, scale_weight_decay=True)
    while not scheduler.finished:
        growth = scheduler.batch_size / 8
        for group in optimizer.param_groups:
            assert group["betas"] == (0.9**growth, 0.95**growth)
            assert group["weight_decay"] == pytest.approx(0.1 * math.sqrt(growth), rel=1e-15)
            base = group["initial_lr"] * PLAN.at(scheduler.samples).lr_factor / math.sqrt(growth) * 0.1 / 8
            assert group["lr"] * group["weight_decay"] / scheduler.batch_size == pytest.approx(base)
        scheduler.step()


def test_the_sgd_rule_keeps_decay_per_sample_by_itself() -> None:
    plan = SeesawPlan.from_cosine(500, 0, 8, alpha=2.0, rule="sgd")
    optimizer = make_optimizer(weight_decay=0.1)
    scheduler = SeesawScheduler(optimizer, plan, micro_batch=4, scale_weight_decay=True)
    while not scheduler.finished:
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.1)
        scheduler.step()


def test_nothing_is_touched_that_was_not_asked_for() -> None:
    optimizer = make_optimizer(betas=(0.9, 0.95), weight_decay=0.1)
    make_scheduler(optimizer).step(300)
    for group in optimizer.param_groups:
        assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.1)
        assert not {"initial_betas", "initial_weight_decay"} & set(group)


def test_state_goes_through_json_and_optimizer_state_does_not_compound() -> None:
    options: dict[str, Any] = {"rescale_betas": True, "scale_weight_decay": True}
    first = make_scheduler(**options)
    first.step(300)
    state = json.loads(json.dumps(first.state_dict()))
    optimizer = make_optimizer()
    optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    again = make_scheduler(optimizer, **options)  # built on an optimizer that is in the middle of a ramp already
    again.load_state_dict(state)
    assert (again.samples, again.steps) == (300, 1)
    while not first.finished:
        assert [{**group, "params": 0} for group in optimizer.param_groups] == [
            {**group, "params": 0} for group in first.optimizer.param_groups
        ]
        first.step()
        again.step()


def test_another_plan_is_refused_and_another_unit_is_not() -> None:
    state = make_scheduler().state_dict()
    other = SeesawScheduler(make_optimizer(), SeesawPlan.from_cosine(500, 40, 8, alpha=1.6, unit=4), micro_batch=4)
    with pytest.raises(
        CheckpointError, match=r"plan: got [0-9a-f]{16}, expected [0-9a-f]{16} of the checkpoint: resume"
    ):
        other.load_state_dict(state)
    SeesawScheduler(make_optimizer(), PLAN.replan(8), micro_batch=4, world_size=2).load_state_dict(state)


def test_what_does_not_fit_is_named() -> None:
    message = (
        "plan: got a batch of 12 at sample 2.., expected multiples of micro_batch . world_size = 8: plan with unit=8"
    )
    with pytest.raises(ConfigError, match=message):
        make_scheduler(world_size=2)
    with pytest.raises(ConfigError, match="rescale_betas: got an optimizer without betas"):
        make_scheduler(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), rescale_betas=True)
    with pytest.raises(ConfigError, match="micro_batch: got 0, expected an integer of at least 1"):
        make_scheduler(micro_batch=0)
    with pytest.raises(ConfigError, match="world_size: got 0, expected an integer of at least 1"):
        make_scheduler(world_size=0)
    with pytest.raises(ConfigError, match="samples: got 0, expected an integer of at least 1"):
        make_scheduler().step(0)


def test_iterate_gives_each_step_its_micro_batches() -> None:
    scheduler = make_scheduler()
    counts = []
    for micro_batches in scheduler.iterate(range(10**6)):
        counts.append((scheduler.samples, len(micro_batches), micro_batches[0]))
        scheduler.step()
    begun = 0
    for n, count, first in counts:
        assert (count, first) == (math.ceil(PLAN.at(n).batch_size / 4), begun)
        begun += count
    with pytest.raises(ConfigError, match=r"iterate: got no call of scheduler.step\(\) since the last step"):
        list(make_scheduler().iterate(range(100)))
    groups = (scheduler := make_scheduler()).iterate(range(5))
    for _ in range(2):
        next(groups)
        scheduler.step()
    with pytest.raises(DataError, match="micro-batches: got an end at sample 16, expected 500 samples"):
        next(groups)


# The sampler.


@settings(max_examples=100, deadline=None)
@given(
    total=st.integers(40, 600),
    alpha=st.sampled_from([1.2, 2.0]),
    unit=st.sampled_from([1, 4, 8]),
    micro_batch=st.integers(2, 9),
    world_size=st.integers(1, 4),
    length=st.integers(1, 100),
    shuffle=st.booleans(),
)
def test_every_rank_and_micro_batch_shares_one_order(
    total: int, alpha: float, unit: int, micro_batch: int, world_size: int, length: int, shuffle: bool
) -> None:
    plan = SeesawPlan.from_cosine(total, 0, 8, alpha=alpha, unit=unit)
    options: dict[str, Any] = {"micro_batch": micro_batch, "world_size": world_size, "seed": 3, "shuffle": shuffle}
    sizes = [row.batch_size for row in plan.rows]
    if any(size // world_size < math.ceil(size / (micro_batch * world_size)) for size in sizes):
        with pytest.raises(ConfigError, match="expected a sample for each"):
            SeesawBatchSampler(plan, length, **options)
        return
    samplers = [SeesawBatchSampler(plan, length, rank=rank, **options) for rank in range(world_size)]
    ranks = [list(sampler) for sampler in samplers]
    assert {len(sampler) for sampler in samplers} == {len(micro_batches) for micro_batches in ranks}
    assert all(1 <= len(micro) <= micro_batch for micro_batches in ranks for micro in micro_batches)
    streams, order = [iter(micro_batches) for micro_batches in ranks], []
    n = 0
    while n < total:
        batch_size = plan.at(n).batch_size
        steps = math.ceil(batch_size / (micro_batch * world_size))
        shares = [[i for micro in islice(stream, steps) for i in micro] for stream in streams]
        assert [len(share) for share in shares] == [len(part) for part in split(range(batch_size), world_size)]
        order += [i for share in shares for i in share]
        n += batch_size
    assert order == Loader(Numbers(length), seed=3, shuffle=shuffle).next(total)["n"].tolist()


class Numbers:
    """A dataset of the numbers below its length."""

    def __init__(self, length: int) -> None:
        self.length, self.fingerprint = length, dict[str, Any]()

    def __len__(self) -> int:
        return self.length

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        return {"n": torch.from_numpy(indices)}


def test_micro_batches_keep_one_shape_where_the_unit_fits() -> None:
    plan = SeesawPlan.from_cosine(1000, 0, 8, alpha=1.3, unit=8)
    sizes = [len(micro) for micro in SeesawBatchSampler(plan, 100, micro_batch=4, world_size=2)]
    assert set(sizes) == {4}
    assert len(sizes) == 125


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker:UserWarning")  # where there is one CPU
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_from_any_step(workers: int) -> None:
    dataset = TensorDataset(torch.arange(70))
    sampler = SeesawBatchSampler(PLAN, dataset, micro_batch=4, seed=1)
    micro_batches = [batch[0].tolist() for batch in DataLoader(dataset, batch_sampler=sampler, num_workers=workers)]
    assert len(micro_batches) == len(sampler) == 125
    assert sorted([i for micro in micro_batches for i in micro][:70]) == list(range(70))
    scheduler = make_scheduler()
    for _ in range(PLAN.total_steps // 2):
        scheduler.step()
    sampler.start = scheduler.samples
    rest = [batch[0].tolist() for batch in DataLoader(dataset, batch_sampler=sampler, num_workers=workers)]
    assert rest == micro_batches[scheduler.samples // 4 :]
    assert len(rest) == len(sampler)


def test_a_sampler_names_what_is_wrong() -> None:
    short = SeesawPlan.from_cosine(81, 0, 8, p=0.0)
    for dataset, options, message in (
        (iter(()), {}, "dataset: got tuple_iterator without a length, expected a map-style dataset"),
        (0, {}, "dataset: got 0, expected an integer of at least 1"),
        (10, {"micro_batch": 0}, "micro_batch: got 0, expected an integer of at least 1"),
        (10, {"rank": 1}, r"rank: got 1, expected an integer in \[0, 1\)"),
        (10, {"start": -1}, "start: got -1, expected an integer of at least 0"),
        (
            10,
            {"world_size": 2, "plan": short},
            "plan: got a step of 1 samples for 2 ranks with 1 micro-batches each, expected a sample for each: plan",
        ),
    ):
        arguments: dict[str, Any] = {"plan": PLAN, "micro_batch": 4, **options}
        with pytest.raises(ConfigError, match=message):
            next(iter(SeesawBatchSampler(arguments.pop("plan"), dataset, **arguments)))  # type: ignore[arg-type]


# Gradients of a step, however it is cut.


def make_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 20)).to(dtype)


def masked_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Next-token loss, sum and count; token 0 is padding."""
    logits, labels = model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
    return nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=0), (labels != 0).sum()


def gradient(model: nn.Module, pieces: list[Tensor]) -> Tensor:
    model.zero_grad()
    count = sum(masked_loss(model, piece)[1] for piece in pieces)
    for piece in pieces:
        (masked_loss(model, piece)[0] / count).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("micro_batch", "world_size"), [(4, 1), (2, 2), (3, 2), (2, 4), (8, 1)])
def test_ranks_and_micro_steps_add_up_to_the_gradient_of_the_batch(
    micro_batch: int, world_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    plan = SeesawPlan.from_cosine(206, 0, 8, alpha=2.0)
    model, tokens = make_model(dtype), torch.randint(0, 20, (64, 7), generator=torch.Generator().manual_seed(0))
    tokens[::3, 4:] = 0
    order = list(SeesawBatchSampler(plan, 64, micro_batch=1))
    samplers = [
        iter(SeesawBatchSampler(plan, 64, micro_batch=micro_batch, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    sizes, n = [], 0
    while n < plan.total:
        batch_size = plan.at(n).batch_size
        steps = math.ceil(batch_size / (micro_batch * world_size))
        pieces = [tokens[micro] for sampler in samplers for micro in islice(sampler, steps)]
        whole = tokens[[i for (i,) in order[n : n + batch_size]]]
        assert torch.equal(torch.cat(pieces), whole)
        assert (gradient(model, pieces) - gradient(model, [whole])).abs().max() < tolerance
        sizes.append(batch_size)
        n += batch_size
    assert sizes[0] < max(sizes)
    assert sizes[-1] % 8


# A bare loop, as the module's docstring shows it.

INSIDE_THE_RAMP = next(row for row in PLAN.rows if row.batch_size > 8).first_step + 1


class Setup:
    """Model, optimizer, scheduler, data and sampler of one process; `run` trains, for some steps or to the end."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        inputs = torch.randn(100, 6)
        self.dataset = TensorDataset(inputs, inputs.prod(dim=1))
        self.model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        options: dict[str, Any] = {"rescale_betas": True, "scale_weight_decay": True}
        self.scheduler = SeesawScheduler(self.optimizer, PLAN, micro_batch=4, **options)
        self.trace: list[tuple[int, int, float]] = []

    def micro_batches(self) -> Iterator[list[list[Tensor]]]:
        sampler = SeesawBatchSampler(PLAN, self.dataset, micro_batch=4, start=self.scheduler.samples)
        return self.scheduler.iterate(DataLoader(self.dataset, batch_sampler=sampler))

    def run(self, steps: int | None = None) -> None:
        for micro_batches in islice(self.micro_batches(), steps):
            for inputs, targets in micro_batches:
                loss = ((self.model(inputs).squeeze(-1) - targets) ** 2).sum() / self.scheduler.batch_size
                loss.backward()
            self.note()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()

    def note(self) -> None:
        self.trace.append((self.scheduler.samples, self.scheduler.batch_size, self.scheduler.get_last_lr()[0]))


def test_a_bare_loop_killed_inside_a_ramp_continues_bit_by_bit() -> None:
    whole, cut, rest = Setup(), Setup(), Setup()
    whole.run()
    assert len(whole.trace) == PLAN.total_steps
    cut.run(INSIDE_THE_RAMP)
    parts = ("model", "optimizer", "scheduler")
    state = copy.deepcopy({part: getattr(cut, part).state_dict() for part in parts})
    for part in parts:
        getattr(rest, part).load_state_dict(state[part])
    rest.run()
    assert cut.trace[-1][1] > 8
    assert cut.trace + rest.trace == whole.trace
    for ours, theirs in zip(rest.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def accelerate() -> Iterator[Any]:
    """The module, without the process-wide state that other tests may have left or will need."""
    module = pytest.importorskip("accelerate")
    states = (module.state.GradientState, module.state.AcceleratorState, module.state.PartialState)
    for state in states:
        state._reset_state()
    yield module
    for state in states:
        state._reset_state()


def test_accelerate_trains_the_same_and_stores_the_scheduler(accelerate: Any, tmp_path: Any) -> None:
    def run(setup: Setup, steps: int | None = None) -> None:
        model, optimizer, scheduler = accelerator.prepare(setup.model, setup.optimizer, setup.scheduler)
        assert scheduler is setup.scheduler
        for micro_batches in islice(setup.micro_batches(), steps):
            for i, (inputs, targets) in enumerate(micro_batches, 1):
                with accelerator.no_sync(model) if i < len(micro_batches) else accelerator.autocast():
                    loss = ((model(inputs).squeeze(-1) - targets) ** 2).sum() / scheduler.batch_size
                    accelerator.backward(loss)
            setup.note()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    plain, first, rest = Setup(), Setup(), Setup()
    plain.run()
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.register_for_checkpointing(first.scheduler)
    run(first, INSIDE_THE_RAMP)
    accelerator.save_state(str(tmp_path))
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.register_for_checkpointing(rest.scheduler)
    accelerator.prepare(rest.model, rest.optimizer)
    accelerator.load_state(str(tmp_path))
    run(rest)
    assert first.trace + rest.trace == plain.trace
    for ours, theirs in zip(rest.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
