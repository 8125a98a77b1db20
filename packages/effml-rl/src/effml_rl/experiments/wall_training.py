"""The trainings of `rl.wall`: fine-tuning on shortcuts, and what goes on from there.

Of a seed there is one fine-tuned policy, kept in the run directory, and everything after it starts from that: GRPO on
few problems, GRPO on many, and more fine-tuning. All three take the same number of steps with the same learning rate
and as many completions per step, drawn or given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from effml_shared import distributed, seeding
from effml_shared.data import Loader
from effml_shared.errors import NonFiniteError
from effml_shared.loop import Budget, Hook, Loop
from effml_shared.runs import Trial
from effml_shared.schedules import Clock, Plan, Schedule
from effml_shared.steps import GradientStep
from effml_shared.transformer import Transformer
from torch import nn

from effml_rl.experiments.wall_setting import FineTuning, Setting
from effml_rl.prompts import PromptData
from effml_rl.solution_tree.examples import Examples
from effml_rl.supervised import supervised_loss
from effml_rl.trainers import GRPOTrainer

__all__ = ["continue_fine_tuning", "fine_tune", "reinforce"]

Measure = Callable[[nn.Module], dict[str, Any]]


class _Until(Hook):
    """Ends a loop once an accuracy is reached, also one that goes on from the checkpoint of that moment."""

    def __init__(self, accuracy: float) -> None:
        self.accuracy = accuracy

    def on_start(self, loop: Loop) -> None:
        self.on_evaluate(loop, loop.evaluation)

    def on_evaluate(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        if loop.clock.step and metrics.get("accuracy", 0.0) >= self.accuracy:
            loop.budget = Budget(steps=loop.clock.step)


def fine_tune(
    setting: Setting, config: FineTuning, evaluate: Callable[[nn.Module], float], measure: Measure, trial: Trial
) -> dict[str, Any]:
    """Train a network on shortcuts, at most until `evaluate` finds it accurate, keep it, and measure it."""
    model = setting.network()
    loop = _supervision(setting, model, config.plan, config.lr, config.clip_norm, config.samples, "fine-tuning", trial)
    loop.evaluate, loop.evaluate_every = (
        lambda: {"accuracy": evaluate(model)},
        config.evaluate_every * config.batch_size,
    )
    if config.until is not None:
        loop.hooks.insert(0, _Until(config.until))

    def keep_and_measure(model: nn.Module) -> dict[str, Any]:
        setting.keep(model)
        return measure(model)

    return _result(loop.run, config.samples, keep_and_measure, model)


def continue_fine_tuning(setting: Setting, measure: Measure, trial: Trial) -> dict[str, Any]:
    """Fine-tune the policy further, with the steps, completions and rate of the reinforced ones, and measure it."""
    rl, model = setting.rl, setting.policy()
    rows = rl.prompts * rl.completions

    def plan(clock: Clock) -> Plan:
        return Plan(rows)

    loop = _supervision(setting, model, plan, rl.lr, rl.clip_norm, rl.steps * rows, "more fine-tuning", trial)
    return _result(loop.run, rl.steps * rows, measure, model)


def reinforce(setting: Setting, problems: Examples, measure: Measure, trial: Trial) -> dict[str, Any]:
    """Reinforce the policy on some problems by GRPO, and measure it."""
    rl, task, model = setting.rl, setting.task, setting.policy()
    trainer = GRPOTrainer(
        distributed.parallelize(model, "ddp"),
        task.verifier,
        rl.policy(task.completion_length, setting.seed),
        sampler=setting.sampler(model, "rollouts", rl.prompts * rl.completions),
    )
    records = [(example.prompt, example.completion) for example in problems]
    data = PromptData(records, seed=seeding.derive_seed(setting.seed, "order of problems"))

    def train() -> Clock:
        return trainer.fit(data, budget=Budget(steps=rl.steps), hooks=trial.hooks, checkpoints=trial.checkpoints)

    return _result(train, rl.samples, measure, model)


def _supervision(
    setting: Setting,
    model: Transformer,
    plan: Schedule,
    lr: float,
    clip_norm: float,
    samples: int,
    purpose: str,
    trial: Trial,
) -> Loop:
    """Return a loop over problems with their solutions, in an order that belongs to the seed and a purpose."""
    replica = distributed.parallelize(model, "ddp")
    optimizer = torch.optim.AdamW(replica.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0)
    data = Loader(
        setting.shortcuts,
        seed=seeding.derive_seed(setting.seed, purpose),
        rank=distributed.rank(),
        world_size=distributed.world_size(),
    )
    return Loop(
        GradientStep(replica, optimizer, supervised_loss, clip_norm=clip_norm),
        data,
        plan,
        budget=Budget(samples=samples),
        hooks=trial.hooks,
        checkpoints=trial.checkpoints,
        seed=setting.seed,
    )


def _result(train: Callable[[], Clock], samples: int, measure: Measure, model: nn.Module) -> dict[str, Any]:
    """Train and measure; after NaN or infinity there is nothing to measure, and the run goes on."""
    try:
        clock = train()
    except NonFiniteError:
        return {"measured": None, "samples": samples}
    return {"measured": measure(model), "steps": clock.step, "seconds": clock.seconds, "samples": samples}
