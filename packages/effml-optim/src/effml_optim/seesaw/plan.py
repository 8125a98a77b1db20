"""Seesaw: trade a part of every learning-rate decay for a larger batch, so that the same samples take fewer steps.

A base schedule decays the learning rate as phi(n) at a constant batch B0, n counting samples. Where it has fallen to
alpha^-k, Seesaw runs the batch B0 alpha^(p k) at the learning rate alpha^-k sqrt(B / B0): divided by sqrt(alpha) where
the base divides by alpha, with a batch alpha times as large. Samples and FLOPs stay the same. For cosines the optimizer
steps fall by up to a third or a half, which saves time only with workers that would idle otherwise (see `speedup`).

Why: with a gradient dominated by its noise, normalised SGD (the proxy of Adam) depends on lr sqrt(B) alone, plain SGD
on lr / B (`rule="sgd"`). p = 1 keeps lr sqrt(B) alpha^(k/2) on the base's line with the most parallelism that is
stable; p > 1 makes the effective rate grow. The argument ends near the critical batch size: measure, and set
`max_batch`, from where on all further decay is learning rate.

State: none; a plan is a pure function of n, so a run resumes anywhere. Cost: one bisection per level, O(log samples)
evaluations of phi each; nothing depends on the number of steps.

Source: arXiv 2510.14717, Theorem 1, Corollary 1 and Assumption 3 (there p = 1, alpha = 1.1). Derived here, not in the
paper: warm-up, p < 1, rounding to a unit, snapping, caps, `"continuous"`, and that the learning rate follows the batch
that a step really has.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import TYPE_CHECKING, TypedDict, Unpack

from effml_shared.checks import check_choice, check_count
from effml_shared.errors import ConfigError
from effml_shared.schedules import Clock, Plan
from torch.optim.lr_scheduler import LRScheduler

from effml_optim.seesaw.decay_curves import (
    half_cosine,
    polygon,
    quarter_cosine,
    scheduler_curve,
    stable_then_line,
    staircase,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Level", "PlanOptions", "Row", "SeesawPlan"]

_SLACK = 1 + 1e-12  # without it a product such as 0.1 * 0.1 misses its level
_GRID = 1024  # points at which a user's phi is checked


class PlanOptions(TypedDict, total=False):
    """What every constructor of `SeesawPlan` takes beside its curve; the fields of `SeesawPlan` explain them."""

    lr: float
    alpha: float
    p: float
    rule: str
    unit: int
    max_batch: int | None
    snap: bool | str
    lr_within_level: str
    allow_unstable: bool


@dataclass(frozen=True)
class Level:
    """From sample `first_sample` on the base schedule has fallen to alpha^-`exponent`; its batch is `batch_size`."""

    first_sample: int
    exponent: int
    batch_size: int


@dataclass(frozen=True)
class Row:
    """Steps that are alike: `steps` of them from `first_step` (`first_sample`) on, at `batch_size` samples each.

    `lr` and `last_lr` belong to the first and the last of them: they differ in warm-up and under `"continuous"`.
    `accumulation_steps` counts micro-steps of one `unit`.
    """

    first_sample: int
    first_step: int
    steps: int
    batch_size: int
    lr: float
    last_lr: float
    accumulation_steps: int


@dataclass(frozen=True, eq=False)
class SeesawPlan:
    """A schedule, `Clock -> Plan`, and what is known of it before training: rows, steps, a table, a plot.

    Attributes:
        phi: the base schedule after warm-up: [0, 1] -> (0, 1], from 1 at 0, non-increasing; 0 at 1 is allowed.
        total: samples of the run, warm-up included.
        warmup: samples of the warm-up, at the batch B0.
        batch_size: B0, samples per step of the base schedule, over all ranks.
        lr: peak learning rate, for rows, table and plot; optimizers keep their own and take `Plan.lr_factor`.
        alpha: ratio of two levels. Nearer 1: more, smaller changes and fewer steps in all.
        p: share of the decay that the batch takes; 0 is the base schedule, 1 is Seesaw.
        rule: `"adam"` (also SOAP, Muon and sign descent): lr ~ sqrt(B); `"sgd"`: lr ~ B.
        unit: batches are multiples of it: micro-batch times data-parallel ranks.
        max_batch: the largest batch; None: no bound.
        snap: batches are rounded half up (False), or down (`"down"`: never above the base's effective rate); True
            rounds half up and lets a level wait until the rounded batch changes.
        lr_within_level: `"step"`: the learning rate changes with the level, as in the paper; `"continuous"`: it follows
            phi within a level and jumps up where the batch grows. Better where alpha is large.
        allow_unstable: admit p > 1.
        rise: learning-rate factor at a fraction [0, 1) of the warm-up; None: (n + B0) / warmup at sample n, at most 1.

    Raises:
        ConfigError: an argument is out of range, or phi is not as described.

    >>> plan = SeesawPlan.from_cosine(1024, 0, 8, kind="quarter", alpha=2.0)
    >>> [(row.first_sample, row.batch_size, row.steps, round(row.lr, 6)) for row in plan.rows]
    [(0, 8, 86, 1.0), (688, 16, 11, 0.707107), (864, 32, 3, 0.5), (960, 64, 1, 0.353553)]
    >>> plan.total_steps, plan.base_steps, plan.at(700)
    (101, 128, Plan(batch_size=16, lr_factor=0.7071067811865476, precision=None))
    """

    phi: Callable[[float], float]
    total: int
    warmup: int
    batch_size: int
    lr: float = 1.0
    alpha: float = 1.1
    p: float = 1.0
    rule: str = "adam"
    unit: int = 1
    max_batch: int | None = None
    snap: bool | str = False
    lr_within_level: str = "step"
    allow_unstable: bool = False
    rise: Callable[[float], float] | None = None

    def __post_init__(self) -> None:
        for name, least in (("total", 1), ("warmup", 0), ("batch_size", 1), ("unit", 1)):
            check_count(name, getattr(self, name), least)
        if not self.warmup < self.total:
            raise ConfigError(f"warmup: got {self.warmup} of {self.total} samples, expected 0 <= warmup < total")
        if self.batch_size % self.unit:
            raise ConfigError(f"batch_size: got {self.batch_size}, expected a multiple of unit = {self.unit}")
        if self.max_batch is not None:
            check_count("max_batch", self.max_batch, self.batch_size)
        if not 1 < self.alpha < math.inf:
            raise ConfigError(f"alpha: got {self.alpha}, expected a number > 1")
        if not 0 <= self.p <= (math.inf if self.allow_unstable else 1):
            hint = "" if self.p < 0 else "; beyond 1 the effective rate grows: allow_unstable=True admits that"
            raise ConfigError(f"p: got {self.p}, expected a number in [0, 1]{hint}")
        if not 0 < self.lr < math.inf:
            raise ConfigError(f"lr: got {self.lr}, expected a number > 0")
        check_choice("rule", self.rule, ("adam", "sgd"))
        check_choice("snap", self.snap, (False, True, "down"))
        check_choice("lr_within_level", self.lr_within_level, ("step", "continuous"))
        self._check_phi()

    def _check_phi(self) -> None:
        if not abs(self.phi(0.0) - 1) <= 1e-9:
            raise ConfigError(f"phi(0): got {self.phi(0.0)}, expected 1")
        span = self.total - self.warmup
        for before, after in pairwise(sorted({span * i // _GRID for i in range(_GRID + 1)} | {span - 1})):
            high, low = self.phi(before / span), self.phi(after / span)
            if not low <= high + 1e-9:
                where = f"an increase from {high:.6g} to {low:.6g} after {after / span:.1%} of the decay"
                raise ConfigError(f"phi: got {where}, expected a non-increasing curve (restarts: one plan per cycle)")
            if not low > 0 and after < span:
                raise ConfigError(
                    f"phi: got {low:.6g} at {after / span:.1%} of the decay, expected (0, 1] before its end"
                )

    @classmethod
    def from_callable(
        cls, phi: Callable[[float], float], total: int, warmup: int, batch_size: int, **options: Unpack[PlanOptions]
    ) -> SeesawPlan:
        """Plan from any decay `phi`, a function of the fraction [0, 1] of the samples after warm-up."""
        return cls(phi, total, warmup, batch_size, **options)

    @classmethod
    def from_cosine(
        cls,
        total: int,
        warmup: int,
        batch_size: int,
        *,
        kind: str = "half",
        min_ratio: float = 0.0,
        **options: Unpack[PlanOptions],
    ) -> SeesawPlan:
        """Plan from a cosine that ends at `min_ratio` of the peak.

        `"half"`, (1 + cos(pi u)) / 2, is what most libraries call cosine (at best half of the steps); `"quarter"`,
        cos(pi u / 2), is the one the paper computes with (at best 36% fewer steps).
        """
        check_choice("kind", kind, ("half", "quarter"))
        _check_min_ratio(min_ratio)
        curve = half_cosine if kind == "half" else quarter_cosine
        return cls(partial(curve, min_ratio), total, warmup, batch_size, **options)

    @classmethod
    def from_linear(
        cls, total: int, warmup: int, batch_size: int, *, min_ratio: float = 0.0, **options: Unpack[PlanOptions]
    ) -> SeesawPlan:
        """Plan from a straight line that ends at `min_ratio` of the peak."""
        return cls.from_wsd(total, warmup, batch_size, decay=1.0, min_ratio=min_ratio, **options)

    @classmethod
    def from_wsd(
        cls,
        total: int,
        warmup: int,
        batch_size: int,
        *,
        decay: float = 0.2,
        min_ratio: float = 0.0,
        **options: Unpack[PlanOptions],
    ) -> SeesawPlan:
        """Plan from warm-up, stable, decay: linear over the last fraction `decay` of the samples after warm-up."""
        _check_min_ratio(min_ratio)
        if not 0 < decay <= 1:
            raise ConfigError(f"decay: got {decay}, expected a fraction in (0, 1]")
        return cls(partial(stable_then_line, decay, min_ratio), total, warmup, batch_size, **options)

    @classmethod
    def from_milestones(
        cls,
        milestones: Sequence[tuple[int, float]],
        total: int,
        warmup: int,
        batch_size: int,
        **options: Unpack[PlanOptions],
    ) -> SeesawPlan:
        """Plan from a step schedule of (n, factor): from sample n on, the base learning rate is `factor` of its peak.

        Here `lr_within_level` defaults to `"continuous"`, which keeps factors exact that are no power of alpha.

        >>> plan = SeesawPlan.from_milestones([(600, 0.5), (900, 0.25)], 1000, 0, 10, alpha=2.0)
        >>> [(row.first_sample, row.batch_size, row.steps) for row in plan.rows]
        [(0, 10, 60), (600, 20, 15), (900, 40, 2), (980, 20, 1)]
        """
        samples = [n for n, _ in milestones]
        if any(not before < after for before, after in pairwise([warmup, *samples, total])):
            raise ConfigError(f"milestones: got samples {samples}, expected them to rise between {warmup} and {total}")
        places = tuple((n - warmup) / (total - warmup) for n in samples)
        curve = partial(staircase, places, (1.0, *(factor for _, factor in milestones)))
        options.setdefault("lr_within_level", "continuous")
        return cls(curve, total, warmup, batch_size, **options)

    @classmethod
    def from_torch_scheduler(
        cls, scheduler: LRScheduler, steps: int, *, batch_size: int, **options: Unpack[PlanOptions]
    ) -> SeesawPlan:
        """Plan from what a new torch scheduler would do in `steps` steps of `batch_size` samples.

        Neither the scheduler nor its optimizer changes. The steps in which the learning rate rises are the warm-up;
        between two steps it is taken as linear in samples. `lr` defaults to the first param group's.

        Raises:
            ConfigError: as `decay_curves.scheduler_curve` says, or the learning rate never falls.
        """
        check_count("steps", steps, 1)
        check_count("batch_size", batch_size, 1)
        rise, fall = scheduler_curve(scheduler, steps)
        options.setdefault("lr", float(scheduler.optimizer.param_groups[0]["initial_lr"]))
        return cls(
            partial(polygon, tuple(fall)),
            steps * batch_size,
            (len(rise) - 1) * batch_size,
            batch_size,
            rise=partial(polygon, tuple(rise)),
            **options,
        )

    def __call__(self, clock: Clock) -> Plan:
        """Return what the step after `clock.samples` samples is to be: a plan is a schedule of effml's loop."""
        return self.at(clock.samples)

    def at(self, n: int) -> Plan:
        """Return batch size and learning-rate factor of the step that begins when `n` samples are consumed.

        Raises:
            ConfigError: `n` is not in [0, total).
        """
        if not 0 <= n < self.total:
            raise ConfigError(f"n: got sample {n}, expected one in [0, {self.total})")
        if n < self.warmup:
            linear = min(1.0, (n + self.batch_size) / self.warmup)
            level, decay = Level(0, 0, self.batch_size), linear if self.rise is None else self.rise(n / self.warmup)
        else:
            level = self.levels[bisect_right(self.levels, n, key=lambda level: level.first_sample) - 1]
            decay = self._phi(n) if self.lr_within_level == "continuous" else self.alpha**-level.exponent
        batch_size = min(level.batch_size, self.total - n)
        return Plan(batch_size, decay * self.lr_boost(batch_size))

    def lr_boost(self, batch_size: int) -> float:
        """Return by how much a batch raises the learning rate over the base schedule's: 1 for `self.batch_size`."""
        growth = batch_size / self.batch_size
        return growth if self.rule == "sgd" else math.sqrt(growth)

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The levels of the decay, in order; of several that begin at one sample, the last."""
        levels = self._all_levels
        if self.snap is True:  # those of the largest batch stay: there, only the learning rate is left to fall
            largest = levels[-1].batch_size
            changed = [True, *(a.batch_size != b.batch_size for a, b in pairwise(levels))]
            levels = tuple(x for x, new in zip(levels, changed, strict=True) if new or x.batch_size == largest)
        return levels

    @cached_property
    def _all_levels(self) -> tuple[Level, ...]:
        levels: dict[int, Level] = {}
        start, exponent = self.warmup, 0
        while start < self.total:
            levels[start] = Level(start, exponent, self._rounded_batch(exponent))
            exponent += 1
            height = self.alpha**-exponent * _SLACK
            reached = lambda n, height=height: self._phi(n) <= height  # noqa: E731
            start = bisect_left(range(self.total), True, start, self.total, key=reached)
        return tuple(levels.values())

    def _rounded_batch(self, exponent: int) -> int:
        """Return B0 alpha^(p exponent), rounded to the unit and capped; no step is longer than the run."""
        power = min(self.p * exponent, 600 / math.log(self.alpha))  # beyond that, floats overflow
        units = self.batch_size * self.alpha**power / self.unit
        rounded = math.floor(units * _SLACK if self.snap == "down" else units + 0.5)
        most = -(-self.total // self.unit) if self.max_batch is None else self.max_batch // self.unit
        return min(rounded, max(most, self.batch_size // self.unit)) * self.unit

    def _phi(self, n: int) -> float:
        return self.phi((n - self.warmup) / (self.total - self.warmup))

    def rows_from(self, n: int) -> tuple[Row, ...]:
        """Return the rows of a run that goes on from sample `n`; steps are counted from there."""
        rows: list[Row] = []
        for first, steps, batch_size in self._runs(n):
            alike = rows and rows[-1].batch_size == batch_size and rows[-1].first_sample >= self.warmup
            if alike and self.lr_within_level == "continuous":
                first, steps = rows[-1].first_sample, rows.pop().steps + steps
            first_step = rows[-1].first_step + rows[-1].steps if rows else 0
            lr, last_lr = (self.lr * self.at(at).lr_factor for at in (first, first + (steps - 1) * batch_size))
            rows.append(Row(first, first_step, steps, batch_size, lr, last_lr, -(-batch_size // self.unit)))
        return tuple(rows)

    def _runs(self, n: int) -> Iterator[tuple[int, int, int]]:
        """Yield (first sample, steps, batch size) of each level that a step begins in, and of the short last step."""
        starts = [(level.first_sample, level.batch_size) for level in self.levels]
        if self.warmup:
            starts.insert(0, (0, self.batch_size))
        ends = [*(first for first, _ in starts[1:]), self.total]
        for end, (_, batch_size) in zip(ends, starts, strict=True):
            if n < end and (steps := min(-(-(end - n) // batch_size), (self.total - n) // batch_size)):
                yield n, steps, batch_size
                n += steps * batch_size
            if n < end:
                yield n, 1, self.total - n
                n = self.total

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The whole run, in order."""
        return self.rows_from(0)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the plan."""
        return sum(row.steps for row in self.rows)

    @property
    def base_steps(self) -> int:
        """Optimizer steps of the base schedule."""
        return -(-self.total // self.batch_size)

    @property
    def step_ratio(self) -> float:
        """Steps of the plan over steps of the base schedule."""
        return self.total_steps / self.base_steps

    @cached_property
    def limit_ratio(self) -> float:
        """The `step_ratio` of infinitely fine levels: with this p and cap, only batches rounded up take fewer steps.

        That is the mean of max(phi^p, B0 / max_batch) after warm-up (arXiv 2510.14717 has it for the quarter cosine),
        here over 4096 midpoints.
        """
        least = self.batch_size / (self.max_batch or math.inf)
        mean = math.fsum(max(self.phi((i + 0.5) / 4096) ** self.p, least) for i in range(4096)) / 4096
        return (self.warmup + (self.total - self.warmup) * mean) / self.total

    def speedup(self, workers: Callable[[int], int], *, micro_batch: int = 1, overhead: float = 0.0) -> float:
        """Return predicted time of the base schedule over that of the plan (derived here, not in the paper).

        A step of B samples takes ceil(B / (micro_batch * workers(B))) micro-steps and `overhead`, in units of one
        micro-step, for communication and optimizer. So workers that are busy already gain the overhead only.

        >>> plan = SeesawPlan.from_cosine(1024, 0, 8, kind="quarter", alpha=2.0)
        >>> plan.speedup(lambda batch: 8), round(plan.speedup(lambda batch: batch), 3)
        (1.0, 1.267)
        """
        check_count("micro_batch", micro_batch, 1)

        def time(batch_size: int) -> float:
            check_count("workers", workers(batch_size), 1)
            return math.ceil(batch_size / (micro_batch * workers(batch_size))) + overhead

        full, rest = divmod(self.total, self.batch_size)
        base = full * time(self.batch_size) + (time(rest) if rest else 0.0)
        return base / math.fsum(row.steps * time(row.batch_size) for row in self.rows)

    def replan(self, unit: int) -> SeesawPlan:
        """Return the plan with batches in multiples of another `unit`, as after a change of the world size.

        Decay, samples, base batch and `fingerprint` stay, so a run resumes with it at any sample. Steps before that
        sample were those of the old plan: `rows_from` has what is left.
        """
        return replace(self, unit=unit)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that a resumed run must share with the run it continues: all but `lr` and `unit`."""
        choices = (self.total, self.warmup, self.batch_size, self.alpha, self.p, self.rule, self.max_batch, self.snap)
        curves = [f"{self.phi(i / 64):.6g} {self.rise(i / 64) if self.rise else 0:.6g}" for i in range(64)]
        starts = [(level.first_sample, level.exponent) for level in self._all_levels]
        return hashlib.sha256(repr((choices, self.lr_within_level, curves, starts)).encode()).hexdigest()[:16]

    def table(self) -> str:
        """Return the plan as text, to be read before training: its rows, its totals and what it saves."""
        counts = {"sample": "first_sample", "step": "first_step", "steps": "steps", "batch": "batch_size"}
        if self.unit > 1:
            counts["accumulate"] = "accumulation_steps"
        cells = [[*counts, "lr"]]
        for row in self.rows:
            lr = f"{row.lr:.4g}" if row.lr == row.last_lr else f"{row.lr:.4g} to {row.last_lr:.4g}"
            cells.append([*(f"{getattr(row, name):,}" for name in counts.values()), lr])
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        saved = f"{1 - self.step_ratio:.1%} fewer; finer levels save at most {1 - self.limit_ratio:.1%}"
        totals = f"{self.total:,} samples in {self.total_steps:,} steps instead of {self.base_steps:,}: {saved}"
        return "\n".join([*lines, totals])

    def plot(self) -> Figure:
        """Return a figure of learning rate and batch size against samples, the base schedule dashed."""
        from matplotlib.figure import Figure

        base = replace(self, p=0.0, max_batch=None, lr_within_level="continuous")
        figure = Figure(figsize=(7, 5), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        for plan, style, label in ((base, "--", "base"), (self, "-", "Seesaw")):
            points = [(row, i) for row in plan.rows for i in sorted({(row.steps - 1) * i // 256 for i in range(257)})]
            samples = [row.first_sample + i * row.batch_size for row, i in points]
            lrs, batches = [self.lr * plan.at(n).lr_factor for n in samples], [row.batch_size for row, _ in points]
            for axes, values in ((top, lrs), (bottom, batches)):
                axes.step([*samples, self.total], [*values, values[-1]], style, where="post", label=label)
        top.set_ylabel("learning rate")
        top.legend()
        bottom.set(xlabel="samples", ylabel="batch size, samples", yscale="log")
        return figure

    def to_megatron(self, seq_length: int = 1) -> str:
        """Return the value of Megatron-LM's `--step-batch-size-schedule`: `"sample:batch sample:batch ..."`.

        Given its `--seq-length`, Megatron counts in tokens: pass the same here. The learning rate is not part of it,
        nor is a short last step.

        >>> SeesawPlan.from_cosine(1024, 0, 8, kind="quarter", alpha=2.0).to_megatron()
        '0:8 688:16 864:32 960:64'
        """
        check_count("seq_length", seq_length, 1)
        pairs = [(row.first_sample, row.batch_size) for row in self.rows]
        rising = [pairs[0], *(after for before, after in pairwise(pairs) if after[1] > before[1])]
        return " ".join(f"{n * seq_length}:{batch_size}" for n, batch_size in rising)


def _check_min_ratio(value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"min_ratio: got {value}, expected a fraction in [0, 1]")
