"""Plans against printed numbers, closed forms and a naive walk; properties of any plan; resume in effml's own loop."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from effml_optim.seesaw.decay_curves import half_cosine, quarter_cosine, stable_then_line, staircase
from effml_optim.seesaw.plan import SeesawPlan
from effml_shared.checkpoint import Checkpoints
from effml_shared.errors import ConfigError
from effml_shared.loop import Budget, Hook, Loop
from effml_shared.schedules import Clock, cosine
from effml_shared.seeding import generator
from effml_shared.steps import GradientStep
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

quarter = partial(SeesawPlan.from_cosine, kind="quarter")
half = partial(SeesawPlan.from_cosine, kind="half")


def rows_of(plan: SeesawPlan) -> list[tuple[int, int, int, float]]:
    return [(row.first_sample, row.batch_size, row.steps, row.lr) for row in plan.rows]


# Printed numbers. A total and a batch a thousand times as large stand for batches that are not rounded.

RATIOS = {
    "quarter": (quarter, 2 / math.pi, (0.77983, 0.72916, 0.69187, 0.66225, 0.65035)),
    "half": (half, 0.5, (0.62239, 0.57686, 0.54503, 0.52057, 0.51095)),
    "linear": (SeesawPlan.from_linear, 0.5, (0.66667, 0.6, 0.55556, 0.52381, 0.51220)),
}


@pytest.mark.parametrize(("make", "limit", "ratios"), RATIOS.values(), ids=RATIOS)
def test_steps_saved_by_curve_and_alpha(make: Callable[..., SeesawPlan], limit: float, ratios: list[float]) -> None:
    for alpha, ratio in zip((2.0, 1.5, 1.25, 1.1, 1.05), ratios, strict=True):
        plan = make(10**10, 0, 64_000, alpha=alpha)
        assert plan.step_ratio == pytest.approx(ratio, abs=1e-4)
        assert plan.limit_ratio == pytest.approx(limit, abs=1e-6)
        assert plan.limit_ratio < plan.step_ratio < alpha * plan.limit_ratio


def test_closed_form_of_a_line() -> None:
    for alpha in (2.0, 1.5, 1.25, 1.1):
        plan = SeesawPlan.from_linear(10**12, 0, 10**6, alpha=alpha)
        assert plan.step_ratio == pytest.approx(alpha / (alpha + 1), abs=1e-5)


def test_limits_with_a_cap_a_floor_and_warm_up() -> None:
    for make, limits in ((quarter, (0.718, 0.6566, 0.6416, 0.6379)), (half, (0.6592, 0.5545, 0.5190, 0.5067))):
        for cap, limit in zip((2, 4, 8, 16), limits, strict=True):
            assert make(10**7, 0, 8, max_batch=8 * cap).limit_ratio == pytest.approx(limit, abs=5e-5)
    assert half(10**6, 0, 8, min_ratio=0.2).limit_ratio == pytest.approx(0.2 + 0.8 / 2, abs=1e-6)
    assert SeesawPlan.from_wsd(10**6, 0, 8, decay=0.3).limit_ratio == pytest.approx(1 - 0.3 / 2, abs=1e-6)
    assert quarter(10**6, 10**5, 8).limit_ratio == pytest.approx(0.673, abs=5e-5)


def test_where_levels_begin() -> None:
    for make, places in (
        (quarter, (0, 0.666667, 0.839139, 0.920214, 0.960185, 0.980102)),
        (half, (0, 0.5, 0.666667, 0.769947, 0.839139, 0.886866)),
    ):
        levels = make(10**9, 0, 8, alpha=2.0).levels[:6]
        assert [level.exponent for level in levels] == list(range(6))
        assert [level.first_sample / 10**9 for level in levels] == pytest.approx(places, abs=5.1e-7)


def test_exact_plans() -> None:
    plan = quarter(1024, 0, 8, alpha=2.0)
    lr = pytest.approx
    expected = [(0, 8, 86, 1.0), (688, 16, 11, lr(0.707107, abs=5e-7)), (864, 32, 3, 0.5)]
    assert rows_of(plan) == [*expected, (960, 64, 1, lr(0.353553, abs=5e-7))]
    assert (plan.total_steps, plan.base_steps, plan.step_ratio) == (101, 128, 101 / 128)
    plan = half(1024, 0, 8, alpha=2.0)
    sizes = [(0, 8, 64), (512, 16, 11), (688, 32, 4), (816, 64, 1), (880, 128, 1), (1008, 16, 1)]
    assert [row[:3] for row in rows_of(plan)] == sizes
    assert plan.total_steps == 82
    assert plan.rows[-1].lr == pytest.approx(0.00138107, abs=5e-9) == 2**-10 * math.sqrt(2)


def test_plans_of_100_000_samples() -> None:
    plan = partial(quarter, 100_000, 0, 16)
    assert plan(alpha=1.1).total_steps == 4146
    assert plan(alpha=1.1).step_ratio == pytest.approx(0.66336, abs=5e-6)
    assert plan(alpha=1.1, unit=16).step_ratio == pytest.approx(0.71184, abs=5e-6)
    assert plan(alpha=2.0, max_batch=64).step_ratio == pytest.approx(0.79328, abs=5e-6)
    assert plan(alpha=2.0, p=0.5).step_ratio == pytest.approx(0.84944, abs=5e-6)


def test_rounding_up_lifts_the_effective_rate_and_rounding_down_never_does() -> None:
    for snap, highest in ((False, 1.24), ("down", 1.0)):
        plan = quarter(100_000, 0, 16, alpha=1.1, unit=16, snap=snap)
        lifts = [plan.alpha**-level.exponent * level.batch_size / 16 for level in plan.levels]
        assert max(lifts) == pytest.approx(highest, abs=5e-3)


def test_snapping_waits_for_the_next_batch_but_still_reaches_the_floor() -> None:
    plan = half(100_000, 0, 16, alpha=1.1, unit=16, snap=True, max_batch=64, min_ratio=0.05)
    batches = [level.batch_size for level in plan.levels]
    assert [size for size, _ in groupby(batches)] == [16, 32, 48, 64]
    assert [len(list(same)) for _, same in groupby(batches)][:-1] == [1, 1, 1]
    assert plan.levels[-1].exponent == half(100_000, 0, 16, alpha=1.1, min_ratio=0.05).levels[-1].exponent
    assert [level.exponent for level in half(100_000, 0, 16, p=0.0, snap=True).levels][:3] == [0, 1, 2]


# A naive walk, sample by sample, straight from the definition.


def naive_steps(plan: SeesawPlan) -> list[tuple[int, int, float]]:
    """Return (first sample, batch size, learning-rate factor) of every step."""
    most = math.inf if plan.max_batch is None else plan.max_batch // plan.unit * plan.unit
    steps, n, k = [], 0, 0
    while n < plan.total:
        if n < plan.warmup:
            batch, decay = plan.batch_size, min(1.0, (n + plan.batch_size) / plan.warmup)
        else:
            height = plan.phi((n - plan.warmup) / (plan.total - plan.warmup))
            while height <= plan.alpha ** -(k + 1) * (1 + 1e-12):
                k += 1
            units = plan.batch_size * plan.alpha ** (plan.p * k) / plan.unit
            rounded = math.floor(units * (1 + 1e-12)) if plan.snap == "down" else math.floor(units + 0.5)
            batch = min(most, rounded * plan.unit)
            decay = height if plan.lr_within_level == "continuous" else plan.alpha**-k
        batch = min(batch, plan.total - n)
        growth = batch / plan.batch_size
        steps.append((n, batch, decay * (growth if plan.rule == "sgd" else math.sqrt(growth))))
        n += batch
    return steps


@st.composite
def plans(draw: st.DrawFn) -> SeesawPlan:
    floor = draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    stairs = (tuple(sorted(draw(st.lists(st.floats(0.01, 0.99), max_size=4, unique=True)))), [1.0, 0.5, 0.3, 0.3, 0.01])
    phi = draw(
        st.sampled_from(
            [
                partial(half_cosine, floor),
                partial(quarter_cosine, floor),
                partial(stable_then_line, draw(st.floats(0.05, 1.0)), floor),
                partial(staircase, *stairs),
                lambda u: math.exp(-9 * u),
                lambda u: 1 / (1 + 20 * u) ** 2,
            ]
        )
    )
    total, unit = draw(st.integers(1, 3000)), draw(st.sampled_from([1, 1, 2, 3, 8]))
    batch_size = unit * draw(st.integers(1, 12))
    return SeesawPlan(
        phi,
        total,
        draw(st.integers(0, total - 1)),
        batch_size,
        lr=draw(st.sampled_from([1.0, 3e-4])),
        alpha=draw(st.sampled_from([1.01, 1.1, 1.5, 2.0, 4.0, 1e6]) | st.floats(1.02, 5.0)),
        p=draw(st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)),
        rule=draw(st.sampled_from(["adam", "sgd"])),
        unit=unit,
        max_batch=draw(st.none() | st.integers(batch_size, 40 * batch_size)),
        snap=draw(st.sampled_from([False, "down"])),
        lr_within_level=draw(st.sampled_from(["step", "continuous"])),
    )


@settings(max_examples=150, deadline=None)
@given(plan=plans())
def test_a_plan_is_what_a_naive_walk_finds(plan: SeesawPlan) -> None:
    steps = naive_steps(plan)
    for n, batch, factor in steps:
        assert plan.at(n) == plan(Clock(samples=n))
        assert (plan.at(n).batch_size, plan.at(n).lr_factor) == (batch, factor)
    walked = []
    for row in plan.rows:
        walked += [(row.first_sample + i * row.batch_size, row.batch_size) for i in range(row.steps)]
    assert walked == [step[:2] for step in steps]
    assert plan.total_steps == len(steps)
    for row in plan.rows:
        first, last = (steps[i][2] * plan.lr for i in (row.first_step, row.first_step + row.steps - 1))
        assert (row.lr, row.last_lr) == (first, last)
        assert row.accumulation_steps == math.ceil(row.batch_size / plan.unit)


@settings(max_examples=150, deadline=None)
@given(plan=plans(), snap=st.sampled_from([False, True, "down"]))
def test_properties_of_any_plan(plan: SeesawPlan, snap: bool | str) -> None:
    plan = replace(plan, snap=snap)
    rows, power = plan.rows, 1.0 if plan.rule == "sgd" else 0.5
    assert sum(row.steps * row.batch_size for row in rows) == plan.total
    assert rows[0].first_sample == rows[0].first_step == 0
    assert plan.base_steps == math.ceil(plan.total / plan.batch_size)
    for before, after in pairwise(rows):
        assert after.first_sample == before.first_sample + before.steps * before.batch_size
        assert after.first_step == before.first_step + before.steps
        short = after is rows[-1] and after.steps == 1
        assert short or (after.batch_size >= before.batch_size and after.batch_size % plan.unit == 0)
    if plan.lr_within_level == "continuous":
        return
    decay = [row for row in rows if row.first_sample >= plan.warmup]
    for row in decay:
        exponent = [level.exponent for level in plan.levels if level.first_sample <= row.first_sample][-1]
        effective, base = row.lr / row.batch_size**power, plan.lr / plan.batch_size**power
        assert effective == pytest.approx(base * plan.alpha**-exponent, rel=1e-12)
        assert row.lr == row.last_lr
    for before, after in pairwise(decay):
        assert (before.batch_size, before.lr) != (after.batch_size, after.lr)
    growth = [(b.batch_size / a.batch_size, plan.alpha ** (b.exponent - a.exponent)) for a, b in pairwise(plan.levels)]
    if all(batches**power <= levels for batches, levels in growth):
        assert all(after.lr <= before.lr * (1 + 1e-12) for before, after in pairwise(decay))


@settings(max_examples=100, deadline=None)
@given(plan=plans(), place=st.floats(0, 1, exclude_max=True))
def test_going_on_from_any_step_gives_the_same_steps(plan: SeesawPlan, place: float) -> None:
    steps = naive_steps(plan)
    left = steps[int(place * len(steps)) :]
    rows = plan.rows_from(left[0][0])
    walked = [(row.first_sample + i * row.batch_size, row.batch_size) for row in rows for i in range(row.steps)]
    assert walked == [step[:2] for step in left]
    assert rows[0].first_step == 0
    assert plan.rows_from(plan.total) == ()


def test_a_coarse_unit_can_make_the_learning_rate_jump_up() -> None:
    lrs = [row.lr for row in quarter(100_000, 0, 16, alpha=1.1, unit=16).rows]
    assert any(after > before for before, after in pairwise(lrs))


# Limits in which a plan is the base schedule.


@pytest.mark.parametrize("options", [{"p": 0.0}, {"max_batch": 8}, {"alpha": 1e12}], ids=["p=0", "cap", "alpha"])
def test_nothing_to_trade_leaves_the_base_schedule_bit_for_bit(options: dict[str, Any]) -> None:
    plan = half(8000, 800, 8, min_ratio=0.1, lr_within_level="continuous", **options)
    base = cosine(8, 8000, warmup=800, floor=0.1)
    for n in range(0, 8000, 8):
        assert plan.at(n).batch_size == 8
        assert plan.at(n).lr_factor == (plan.phi((n - 800) / 7200) if n >= 800 else (n + 8) / 800)
        assert plan.at(n).lr_factor == pytest.approx(base(Clock(samples=n)).lr_factor, abs=1e-15)
    assert plan.step_ratio == 1


def test_in_step_mode_a_plan_without_growth_is_a_staircase_of_powers() -> None:
    plan = half(8000, 0, 8, alpha=1.5, p=0.0)
    for n in range(0, 8000, 8):
        exponent = math.floor(-math.log(plan.phi(n / 8000), 1.5) + 1e-9)
        assert (plan.at(n).batch_size, plan.at(n).lr_factor) == (8, 1.5**-exponent)


def test_a_huge_alpha_keeps_the_batch_until_the_decay_reaches_it() -> None:
    plan = half(100_000, 0, 10, alpha=100.0, lr_within_level="continuous")
    first = plan.levels[1].first_sample
    assert [row.batch_size for row in plan.rows][:2] == [10, 1000]
    assert plan.phi(first / 100_000) <= 0.01 < plan.phi((first - 1) / 100_000)


def test_a_constant_schedule_is_one_row() -> None:
    plan = SeesawPlan.from_callable(lambda u: 1.0, 1000, 0, 10, lr=0.3)
    assert rows_of(plan) == [(0, 10, 100, 0.3)]
    assert plan.step_ratio == plan.limit_ratio == 1


def test_of_levels_that_begin_together_the_last_one_counts() -> None:
    plan = SeesawPlan.from_milestones([(500, 0.1), (800, 0.01)], 1000, 0, 10, alpha=10.0, lr_within_level="step")
    assert rows_of(plan) == [(0, 10, 50, 1.0), (500, 100, 3, pytest.approx(0.1**0.5)), (800, 200, 1, 0.01 * 20**0.5)]
    finer = SeesawPlan.from_milestones([(500, 0.1)], 1000, 0, 10)
    assert [(level.first_sample, level.exponent) for level in finer.levels] == [(0, 0), (500, 24)]
    assert finer.at(500).lr_factor == 0.1 * math.sqrt(finer.at(500).batch_size / 10)


def test_a_trillion_samples() -> None:
    plan = half(10**12, 10**10, 256)
    assert sum(row.steps * row.batch_size for row in plan.rows) == 10**12
    assert plan.step_ratio == pytest.approx(0.01 + 0.99 * 0.52057, abs=2e-4)
    n = 10**12 - 1
    assert plan.at(n).batch_size == 1
    assert 0 < plan.at(n).lr_factor < 1e-12
    assert len(quarter(10**12, 0, 256, max_batch=10**4, alpha=1.01).levels) > 1000


def test_p_beyond_1_makes_the_effective_rate_grow() -> None:
    plan = quarter(100_000, 0, 8, alpha=2.0, p=2.0, allow_unstable=True)
    rates = [row.lr * math.sqrt(row.batch_size) for row in plan.rows[:-1]]
    assert rates == sorted(rates)
    assert rates[-1] > rates[0]
    rates = [row.lr * math.sqrt(row.batch_size) for row in quarter(100_000, 0, 8, alpha=2.0).rows[:-1]]
    assert rates == pytest.approx([rates[0]] * len(rates), rel=1e-12)


def test_the_sgd_rule_keeps_the_learning_rate() -> None:
    rows = quarter(100_000, 0, 8, alpha=2.0, rule="sgd", lr=0.5).rows
    assert {row.lr for row in rows[:-1]} == {0.5}
    assert [row.batch_size for row in rows] == [row.batch_size for row in quarter(100_000, 0, 8, alpha=2.0).rows]


# Torch schedulers.


def adamw() -> torch.optim.Optimizer:
    return torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=0.02)


def test_torch_cosine_is_the_half_cosine() -> None:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(adamw(), T_max=1000, eta_min=0.002)
    ours = half(16_000, 0, 16, min_ratio=0.1)
    theirs = SeesawPlan.from_torch_scheduler(scheduler, 1000, batch_size=16)
    assert theirs.lr == 0.02
    for step in range(1001):
        assert theirs.phi(step / 1000) == pytest.approx(ours.phi(step / 1000), abs=1e-9)
    assert [row[:3] for row in rows_of(theirs)] == [row[:3] for row in rows_of(ours)]
    for row, other in zip(ours.rows, theirs.rows, strict=True):
        assert 0.02 * row.lr == pytest.approx(other.lr, abs=1e-9)
    for plan in (ours, theirs):
        base = replace(plan, p=0.0, lr_within_level="continuous")
        for n in range(0, 16_000, 16):
            assert base.at(n).lr_factor == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * n / 16_000)) / 2, abs=1e-9)


def test_a_scheduler_without_growth_is_reproduced_with_its_warm_up() -> None:
    optimizer = adamw()
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=30)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=170)
    scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[30])
    options: dict[str, Any] = {"p": 0.0, "lr_within_level": "continuous"}
    plan = SeesawPlan.from_torch_scheduler(scheduler, 200, batch_size=8, **options)
    assert (plan.warmup, plan.total) == (240, 1600)
    for step in range(200):
        assert plan.at(8 * step).batch_size == 8
        assert 0.02 * plan.at(8 * step).lr_factor == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()


def test_a_step_schedule_of_torch_trades_at_its_steps() -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(adamw(), step_size=50, gamma=0.5)
    plan = SeesawPlan.from_torch_scheduler(scheduler, 150, batch_size=8, alpha=2.0)
    assert [row[:3] for row in rows_of(plan)] == [(0, 8, 50), (400, 16, 25), (800, 32, 12), (1184, 16, 1)]


def test_a_scheduler_that_only_rises_has_nothing_to_trade() -> None:
    scheduler = torch.optim.lr_scheduler.LinearLR(adamw(), 0.1, total_iters=20)
    with pytest.raises(ConfigError, match="warmup: got 160 of 160 samples"):
        SeesawPlan.from_torch_scheduler(scheduler, 20, batch_size=8)


# What a user reads, and what a resumed run is compared by.


def test_the_table_says_what_will_happen() -> None:
    lines = half(1024, 100, 8, alpha=2.0, unit=4, lr=0.01).table().splitlines()
    assert lines[0].split() == ["sample", "step", "steps", "batch", "accumulate", "lr"]
    assert lines[1].split() == ["0", "0", "13", "8", "2", "0.0008", "to", "0.01"]
    assert lines[-2].split() == ["1,016", "86", "1", "8", "2", "2.441e-06"]
    assert lines[-1].startswith(
        "1,024 samples in 87 steps instead of 128: 32.0% fewer; finer levels save at most 45.1%"
    )
    assert len({len(line) for line in lines[:-1]}) == 1
    assert "accumulate" not in half(1024, 100, 8).table()


def test_the_plot_shows_plan_and_base() -> None:
    plan = half(1024, 100, 8, alpha=2.0)
    rates, batches = plan.plot().axes
    base, ours = batches.lines
    assert (base.get_linestyle(), ours.get_linestyle()) == ("--", "-")
    assert set(base.get_ydata()) == {8}
    assert {row.batch_size for row in plan.rows} <= set(ours.get_ydata())
    assert all(line.get_ydata()[0] == plan.rows[0].lr for line in rates.lines)


def test_megatron_gets_the_same_batches() -> None:
    plan = half(1024, 0, 8, alpha=2.0)
    assert plan.to_megatron() == "0:8 512:16 688:32 816:64 880:128"
    assert plan.to_megatron(seq_length=1024).split()[1] == f"{512 * 1024}:16"
    assert half(1024, 0, 8, p=0.0).to_megatron() == "0:8"


def test_busy_workers_gain_nothing_and_idle_ones_the_step_ratio() -> None:
    plan = half(10_240, 0, 8, alpha=2.0)
    assert plan.speedup(lambda batch: 2, micro_batch=4) == pytest.approx(1, abs=0.01)
    assert plan.speedup(lambda batch: batch) == 1 / plan.step_ratio
    assert plan.speedup(lambda batch: 32) == pytest.approx(
        1 / half(10_240, 0, 8, alpha=2.0, max_batch=32).step_ratio, 0.03
    )
    assert 1 < plan.speedup(lambda batch: 8, overhead=0.5) < 1 / plan.step_ratio
    with pytest.raises(ConfigError, match="workers: got 0, expected an integer of at least 1"):
        plan.speedup(lambda batch: 0)


def test_another_world_size_keeps_decay_samples_and_fingerprint() -> None:
    plan = half(4096, 512, 16, alpha=2.0, unit=8)
    finer, coarser = plan.replan(4), plan.replan(16)
    assert (
        [row[:3] for row in rows_of(finer)]
        == [row[:3] for row in rows_of(plan)]
        == [row[:3] for row in rows_of(coarser)]
    )
    assert [row.accumulation_steps for row in finer.rows] == [2 * row.accumulation_steps for row in plan.rows]
    uneven = half(4096, 512, 48, alpha=1.5, unit=16).replan(24)
    assert all(row.batch_size % 24 == 0 for row in uneven.rows_from(1000)[:-1])
    assert plan.fingerprint == finer.fingerprint == coarser.fingerprint == replace(plan, lr=0.1).fingerprint
    with pytest.raises(ConfigError, match="batch_size: got 16, expected a multiple of unit = 32"):
        plan.replan(32)


def test_the_fingerprint_tells_plans_apart() -> None:
    plan = half(4096, 512, 16)
    again = half(4096, 512, 16)
    others = [
        quarter(4096, 512, 16),
        half(4096, 512, 16, min_ratio=0.01),
        SeesawPlan.from_milestones([(3000, 0.5)], 4096, 512, 16),
        SeesawPlan.from_milestones([(3001, 0.5)], 4096, 512, 16),
        *(replace(plan, **{name: value}) for name, value in CHANGES.items()),
    ]
    assert plan.fingerprint == again.fingerprint
    assert len({plan.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1


CHANGES: dict[str, Any] = {
    "total": 4097,
    "warmup": 511,
    "batch_size": 17,
    "alpha": 1.2,
    "p": 0.9,
    "rule": "sgd",
    "max_batch": 64,
    "snap": True,
    "lr_within_level": "continuous",
    "rise": math.sqrt,
}


def test_plans_can_be_pickled_and_not_changed() -> None:
    plan = half(4096, 512, 16)
    assert pickle.loads(pickle.dumps(plan)).rows == plan.rows
    with pytest.raises(AttributeError):
        plan.total = 5  # type: ignore[misc]


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total": 1e4}, "total: got 10000.0, expected an integer of at least 1"),
        ({"warmup": -1}, "warmup: got -1, expected an integer of at least 0"),
        ({"warmup": 1000}, "warmup: got 1000 of 1000 samples, expected 0 <= warmup < total"),
        ({"batch_size": 0}, "batch_size: got 0, expected an integer of at least 1"),
        ({"unit": 0}, "unit: got 0, expected an integer of at least 1"),
        ({"unit": 3}, "batch_size: got 8, expected a multiple of unit = 3"),
        ({"max_batch": 7}, "max_batch: got 7, expected an integer of at least 8"),
        ({"alpha": 1.0}, "alpha: got 1.0, expected a number > 1"),
        ({"alpha": math.nan}, "alpha: got nan, expected a number > 1"),
        ({"p": -0.1}, "p: got -0.1, expected a number in [0, 1]"),
        (
            {"p": 1.5},
            "p: got 1.5, expected a number in [0, 1]; "
            "beyond 1 the effective rate grows: allow_unstable=True admits that",
        ),
        ({"lr": 0.0}, "lr: got 0.0, expected a number > 0"),
        ({"rule": "lion"}, "rule: got 'lion', expected one of 'adam', 'sgd'"),
        ({"snap": "up"}, "snap: got 'up', expected one of False, True, 'down'"),
        ({"lr_within_level": "smooth"}, "lr_within_level: got 'smooth', expected one of 'step', 'continuous'"),
        ({"kind": "full"}, "kind: got 'full', expected one of 'half', 'quarter'"),
        ({"min_ratio": 2.0}, "min_ratio: got 2.0, expected a fraction in [0, 1]"),
    ],
)
def test_every_wrong_argument_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        half(**{"total": 1000, "warmup": 0, "batch_size": 8, **options})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("phi", "message"),
    [
        (lambda u: 2 - u, "phi(0): got 2.0, expected 1"),
        (lambda u: math.nan, "phi(0): got nan, expected 1"),
        (
            lambda u: 1 - u if u < 0.5 else u,
            "phi: got an increase from 0.5 to 0.501 after 50.1% of the decay, expected a non-increasing curve",
        ),
        (lambda u: max(0.0, 1 - 2 * u), "phi: got 0 at 50.0% of the decay, expected (0, 1] before its end"),
        (lambda u: 1 - 1.5 * u, "phi: got -0.0005 at 66.7% of the decay, expected (0, 1] before its end"),
        (lambda u: 1.0 if u < 0.5 else math.nan, "phi: got an increase from 1 to nan after 50.0% of the decay"),
    ],
)
def test_a_curve_that_is_no_decay_is_refused(phi: Callable[[float], float], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        SeesawPlan.from_callable(phi, 1000, 0, 8)
    assert str(error.value).startswith(message)


def test_other_constructors_and_calls_name_their_arguments() -> None:
    plan = half(1000, 0, 8)
    for call, message in (
        (lambda: SeesawPlan.from_wsd(1000, 0, 8, decay=0.0), r"decay: got 0.0, expected a fraction in \(0, 1\]"),
        (lambda: SeesawPlan.from_linear(1000, 0, 8, min_ratio=-1.0), "min_ratio: got -1.0, expected a fraction"),
        (
            lambda: SeesawPlan.from_milestones([(50, 0.5)], 1000, 100, 8),
            r"milestones: got samples \[50\], expected them to rise between 100 and 1000",
        ),
        (
            lambda: SeesawPlan.from_milestones([(50, 0.5), (70, 0.6)], 1000, 0, 8),
            "phi: got an increase from 0.5 to 0.6",
        ),
        (lambda: plan.at(1000), r"n: got sample 1000, expected one in \[0, 1000\)"),
        (lambda: plan.at(-1), r"n: got sample -1, expected one in \[0, 1000\)"),
        (lambda: plan.to_megatron(0), "seq_length: got 0, expected an integer of at least 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()


# effml's own loop.


class Points:
    """An endless regression stream, indexed by samples consumed."""

    def __init__(self) -> None:
        self.position = 0

    def next(self, batch_size: int) -> torch.Tensor:
        rows = [torch.randn(4, generator=generator(0, self.position + i)) for i in range(batch_size)]
        self.position += batch_size
        return torch.stack(rows)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class Killed(Exception):
    """Stands for a process that is gone."""


class Trace(Hook):
    """Record (n, batch size, learning rate) of every step, and die when told to."""

    def __init__(self, die_at: int | None = None) -> None:
        self.die_at, self.before = die_at, 0
        self.steps: list[tuple[int, int, float]] = []

    def on_start(self, loop: Loop) -> None:
        self.before = loop.clock.samples

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        self.steps.append((self.before, loop.clock.samples - self.before, metrics["lr"]))
        self.before = loop.clock.samples
        if loop.clock.step == self.die_at:
            raise Killed


def regression(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return ((model(x).squeeze(-1) - x.sum(1)) ** 2).sum(), torch.tensor(len(x))


def train(plan: SeesawPlan, folder: Path, die_at: int | None = None) -> tuple[Trace, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.2), nn.Tanh(), nn.Linear(16, 1))
    step = GradientStep(model, torch.optim.AdamW(model.parameters(), lr=0.01), regression, micro_batch=plan.unit)
    trace = Trace(die_at)
    budget, checkpoints = Budget(samples=plan.total), Checkpoints(folder)
    loop = Loop(step, Points(), plan, budget=budget, hooks=[trace], checkpoints=checkpoints)
    try:
        loop.run()
    except Killed:
        loop.save()
    return trace, [parameter.detach().clone() for parameter in model.parameters()]


def test_a_run_killed_inside_a_ramp_continues_bit_by_bit(tmp_path: Path) -> None:
    plan = half(700, 60, 4, alpha=1.5, unit=4, lr=0.01)
    whole, weights = train(plan, tmp_path / "whole")
    assert whole.steps == [(n, batch, pytest.approx(0.01 * lr)) for n, batch, lr in naive_steps(plan)]
    assert len(whole.steps) == plan.total_steps
    die_at = next(row for row in plan.rows if row.batch_size > 8).first_step + 1
    first, _ = train(plan, tmp_path / "cut", die_at)
    rest, resumed = train(plan, tmp_path / "cut")
    assert first.steps + rest.steps == whole.steps
    assert rest.steps[0][1] > 4
    assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))


def test_a_run_can_go_on_with_another_unit(tmp_path: Path) -> None:
    plan = half(700, 60, 8, alpha=1.5, unit=4, lr=0.01)
    first, _ = train(plan, tmp_path, die_at=30)
    rest, _ = train(plan.replan(8), tmp_path)
    n = first.steps[-1][0] + first.steps[-1][1]
    expected = [(row.first_sample, row.batch_size) for row in plan.replan(8).rows_from(n) for _ in range(row.steps)]
    assert [batch for _, batch, _ in rest.steps] == [batch for _, batch in expected]
    assert rest.steps[0][0] == n
    assert sum(batch for _, batch, _ in first.steps + rest.steps) == 700
