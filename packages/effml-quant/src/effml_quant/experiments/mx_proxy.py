"""The trials of `quant.mx` on the student-teacher proxy: what biases its gradient, and runs changed half-way.

`train_and_measure` trains in float32 and, at given steps, measures the gradient's bias under many schemes at that same
point; at one of them it also moves the gains along their exact symmetry and measures again. `train_exact`,
`train_quantised` and `continue_training` are one problem seen three times: float32; a scheme up to the switch; and each
intervention from that checkpoint on, with weights, moments and data as they were.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from effml_shared import distributed, seeding
from effml_shared.checkpoint import Checkpoints
from effml_shared.checks import check_count, check_range
from effml_shared.errors import CheckpointError, ConfigError, NonFiniteError
from effml_shared.loop import Budget, Hook, Loop
from effml_shared.runs import Trial
from effml_shared.schedules import Plan
from effml_shared.steps import GradientStep
from torch import nn

from effml_quant.formats import find_format
from effml_quant.instability.clamping import ClampCount, count_clamped, find_gains
from effml_quant.instability.gradient_bias import GradientBiasMeter, total
from effml_quant.instability.interventions import intervene, run_intervention
from effml_quant.instability.proxy import ProxyConfig, StudentTeacher, proxy_loss
from effml_quant.instability.rescaling import rescale_gains
from effml_quant.precision.application import apply_scheme
from effml_quant.precision.scheme import PrecisionScheme

__all__ = [
    "SCHEMES",
    "BiasStudy",
    "DualStudy",
    "all_mx",
    "continue_training",
    "train_and_measure",
    "train_exact",
    "train_quantised",
]

E4M3 = "mxfp8_e4m3"


def all_mx(fmt: str = E4M3, **fields: Any) -> PrecisionScheme:
    """Return: weights, activations, gradients and the gains of norms in one format."""
    return PrecisionScheme.mx(fmt, **{"norm_affine": fmt, **fields})


# What is compared at one point: blocked formats alone, without the rounding of everything else to bfloat16.
SCHEMES: dict[str, PrecisionScheme] = {
    "all E4M3": all_mx(vector=None),
    "norms exempt": all_mx(vector=None, norm_affine=None),
    "rceil": all_mx(vector=None, scale_rule="rceil"),
    "forward only": all_mx(vector=None, quantize_backward=False),
    "bf16 inputs": PrecisionScheme.bf16_act(vector=None, norm_affine=E4M3),
    "bf16 inputs and gradients": PrecisionScheme.bf16_act_all(vector=None, norm_affine=E4M3),
    "all E5M2": all_mx("mxfp8_e5m2", vector=None),
    "all E2M3": all_mx("mxfp6_e2m3", vector=None),
    "all E3M2": all_mx("mxfp6_e3m2", vector=None),
    "all E2M1": all_mx("mxfp4", vector=None),
}
RESCALED = ("all E4M3", "rceil", "norms exempt")


@dataclass
class BiasStudy:
    """One float32 training per seed, and the points at which gradients are compared."""

    width: int = 64
    depth: int = 4
    batch_size: int = 256
    lr: float = 1e-3  # at 3e-3 gains clamp before they are rescaled
    steps: int = 1000
    measure_at: list[int] = field(default_factory=lambda: [0, 100, 500, 1000])  # steps
    probe_batches: int = 8  # held out, pooled
    rescale_at: int = 100  # step; one of measure_at
    factors: list[float] = field(default_factory=lambda: [1.0, 0.97, 0.95, 0.92, 1.9])  # 1, then the sharpest first
    rescale_batches: int = 4
    seeds: int = 5

    def __post_init__(self) -> None:
        for name in ("width", "depth", "batch_size", "steps", "probe_batches", "rescale_batches", "seeds"):
            check_count(name, getattr(self, name), 1)
        check_range("lr", self.lr, 0.0)
        at = self.measure_at
        if not at or at != sorted(set(at)) or not 0 <= at[0] <= at[-1] <= self.steps or not any(at):
            raise ConfigError(f"measure_at: got {at}, expected rising steps of 0 to {self.steps}, one of them above 0")
        if self.rescale_at not in at:
            raise ConfigError(f"rescale_at: got {self.rescale_at}, expected one of measure_at={at}")
        if len(self.factors) < 2 or self.factors[0] != 1 or 0 in self.factors:
            raise ConfigError(f"factors: got {self.factors}, expected 1 and then others, none of them 0")

    @property
    def trained(self) -> list[int]:
        """Steps of measurement at which the model is trained."""
        return [step for step in self.measure_at if step]


@dataclass
class DualStudy:
    """The same problem in float32, in a format, and in that format with interventions from a mid step on."""

    width: int = 32
    depth: int = 3
    batch_size: int = 128
    lr: float = 3e-3
    steps: int = 400
    switch_at: int = 200  # step
    formats: list[str] = field(default_factory=lambda: [E4M3, "mxfp4"])
    interventions: list[str] = field(
        default_factory=lambda: ["fp32", "bump_exponent", "no_norm_quant", "bf16_act_all", "forward_only"]
    )
    eval_batches: int = 4
    eval_batch_size: int = 1024
    seeds: int = 3
    compile: bool = False  # of the student

    def __post_init__(self) -> None:
        for name in ("width", "depth", "batch_size", "steps", "eval_batches", "eval_batch_size", "seeds"):
            check_count(name, getattr(self, name), 1)
        check_range("lr", self.lr, 0.0)
        if not 0 < self.switch_at < self.steps:
            raise ConfigError(f"switch_at: got {self.switch_at}, expected a step of 1 to {self.steps - 1}")
        for fmt in self.formats:
            find_format(fmt)
        for name in self.interventions:
            intervene(name, PrecisionScheme())

    @property
    def branches(self) -> list[str]:
        """What happens at the switch."""
        return ["none", *self.interventions]


class _BiasRecord(Hook):
    """Measure at the points of a `BiasStudy`; what was measured travels in the checkpoints.

    Attributes:
        rho: by step and scheme.
        rescaled: by factor: `clamped`, the share of gains, and by scheme `rho` and `loss`, over that in float32.
    """

    def __init__(self, study: BiasStudy, proxy: StudentTeacher) -> None:
        self.study, self.student = study, proxy.student
        self.meter = GradientBiasMeter(apply_scheme(proxy.student, None), proxy_loss)
        self.probe = proxy.held_out(study.probe_batches, study.batch_size)
        self.rho: dict[str, dict[str, float]] = {}
        self.rescaled: dict[str, dict[str, Any]] = {}

    def on_start(self, loop: Loop) -> None:
        if loop.clock.step == 0:
            self._measure(0)

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        rho = self._measure(loop.clock.step)
        cast(dict[str, float], metrics).update({f"rho/{name}": value for name, value in rho.items()})

    def _measure(self, step: int) -> dict[str, float]:
        if step not in self.study.measure_at:
            return {}
        biases = self.meter.compare(*self.probe, schemes=SCHEMES)
        self.rho[str(step)] = {name: total(groups).rho for name, groups in biases.items()}
        if step == self.study.rescale_at:
            self.rescaled = {f"{factor:g}": self._rescale(factor) for factor in self.study.factors}
        return self.rho[str(step)]

    def _rescale(self, factor: float) -> dict[str, Any]:
        student = copy.deepcopy(self.student)
        rescale_gains(student.gains(), factor)
        handle, batches = apply_scheme(student, None), self.probe[: self.study.rescale_batches]
        schemes = {name: SCHEMES[name] for name in RESCALED}
        biases = GradientBiasMeter(handle, proxy_loss).compare(*batches, schemes=schemes)
        exact, ratio = _mean_loss(student, batches), {}
        for name, scheme in schemes.items():
            with handle.using(scheme):
                ratio[name] = _mean_loss(student, batches) / exact
        clamped = sum((count_clamped(gain, E4M3) for gain in find_gains(student).values()), ClampCount())
        rho = {name: total(groups).rho for name, groups in biases.items()}
        return {"clamped": clamped.clamp_fraction, "rho": rho, "loss": ratio}

    def state_dict(self) -> dict[str, Any]:
        return {"rho": self.rho, "rescaled": self.rescaled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rho, self.rescaled = state["rho"], state["rescaled"]


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: Sequence[Any]) -> float:
    sums = [proxy_loss(model, batch) for batch in batches]
    return float(sum(terms for terms, _ in sums) / sum(count for _, count in sums))


class _OwnName(Hook):
    """Record the training loss as `proxy_loss`: a report draws all that is called `loss` on one scale."""

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        cast(dict[str, float], metrics)["proxy_loss"] = metrics["loss"]
        del cast(dict[str, float], metrics)["loss"]


def _proxy(study: BiasStudy | DualStudy, seed: int) -> StudentTeacher:
    config = ProxyConfig(study.width, study.depth, seed=seeding.derive_seed(seed, "quant.mx"))
    return StudentTeacher(config, distributed.default_device())


def _loop(
    study: BiasStudy | DualStudy, proxy: StudentTeacher, steps: int, hooks: Sequence[Hook], trial: Trial, seed: int
) -> Loop:
    optimizer = torch.optim.Adam(proxy.student.parameters(), study.lr)
    step = GradientStep(proxy.student, optimizer, proxy_loss, compile=getattr(study, "compile", False))
    held_out = proxy.held_out(study.eval_batches, study.eval_batch_size) if isinstance(study, DualStudy) else None
    return Loop(
        step,
        proxy.data(),
        lambda clock: Plan(study.batch_size),
        budget=Budget(steps=steps),
        hooks=[*hooks, _OwnName(), *trial.hooks],
        evaluate=None if held_out is None else lambda: step.evaluate(held_out),
        checkpoints=trial.checkpoints,
        seed=seed,
    )


def train_and_measure(study: BiasStudy, seed: int, trial: Trial) -> dict[str, Any]:
    """Train in float32; return `rho` and `rescaled`, as the study has them."""
    proxy = _proxy(study, seed)
    record = _BiasRecord(study, proxy)
    clock = _loop(study, proxy, study.steps, [record], trial, seed).run()
    return {"samples": clock.samples, "rho": record.rho, "rescaled": record.rescaled}


def train_exact(study: DualStudy, seed: int, trial: Trial) -> dict[str, Any]:
    """Train in float32 to the end; return the held-out `loss`."""
    proxy = _proxy(study, seed)
    return _result(_loop(study, proxy, study.steps, [], trial, seed))


def train_quantised(study: DualStudy, fmt: str, seed: int, trial: Trial, kept: Path) -> dict[str, Any]:
    """Train in a format to the switch and leave a checkpoint there in `kept`; return the held-out `loss`."""
    proxy = _proxy(study, seed)
    apply_scheme(proxy.student, all_mx(fmt))
    result = _result(_loop(study, proxy, study.switch_at, [], trial, seed))
    if result["loss"] is not None and (last := trial.checkpoints.load()) is not None:
        Checkpoints(kept).save(last.step, last.state, last.rank_state)
    return result


def continue_training(study: DualStudy, fmt: str, branch: str, seed: int, trial: Trial, kept: Path) -> dict[str, Any]:
    """Go on from the checkpoint in `kept` under an intervention, or `none`, to the end; return the held-out `loss`."""
    proxy = _proxy(study, seed)
    handle = apply_scheme(proxy.student, all_mx(fmt))
    checkpoint = Checkpoints(kept).load()
    if checkpoint is None:
        raise CheckpointError(f"{kept}: got no checkpoint to continue from; was it deleted? start a new run")
    loop = _loop(study, proxy, study.steps, [], trial, seed)
    return _result(loop, lambda: run_intervention(branch, loop, handle, checkpoint))


def _result(loop: Loop, run: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Run the loop; a training that meets NaN or infinity has no loss."""
    try:
        (run or loop.run)()
        loss = loop.evaluation["loss"]
    except NonFiniteError:
        loss = math.nan
    return {"samples": loop.clock.samples, "loss": loss if math.isfinite(loss) else None}
