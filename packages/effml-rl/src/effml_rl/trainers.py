"""Trainers: a model, something that verifies, a config; one step at a time, or driven by effml's loop.

    trainer = GRPOTrainer(model, NumericMatch(), dapo(lr=1e-5), tokenizer=tokenizer)
    metrics = trainer.step(prompts, targets)                       # in a loop of one's own
    trainer.fit(PromptData(records), budget=Budget(steps=200))     # or in effml's, with checkpoints, hooks, evaluation

All are `PolicyStep`s with other defaults. A hook of the loop finds the rollouts of a step, with their texts and
verdicts, at `loop.step.last`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from effml_shared import distributed, seeding
from effml_shared.checkpoint import Checkpoints
from effml_shared.errors import ConfigError
from effml_shared.generation import unwrap
from effml_shared.loop import Budget, Data, Hook, Loop
from effml_shared.schedules import Clock, Plan, Schedule
from torch import nn

from effml_rl.policy_config import PolicyConfig, grpo, ppo, rloo
from effml_rl.policy_step import PolicyStep
from effml_rl.prompts import Prompt, PromptData
from effml_rl.reference import Reference
from effml_rl.rollouts import Collector, Rollouts, Samples, VerifierScorer
from effml_rl.sampler import Sampler
from effml_rl.verifiers.verdict import Verifier

__all__ = ["GRPOTrainer", "PPOTrainer", "PolicyTrainer", "RLOOTrainer"]


class PolicyTrainer:
    """What the trainers have in common: everything but defaults.

    Args:
        model: a causal language model, of effml or of Hugging Face, with or without peft adapters, or wrapped by DDP.
        verifier: a `Verifier`, a plain reward function `f(prompts, completions, **columns)`, or a list of them.
        config: default `grpo()`; see `effml_rl.policy_config` for the presets.
        tokenizer: turns prompts into ids and completions into text; its end token ends a completion.
        sampler: in place of the ordinary one, which needs the tokenizer.
        ref_model: of a KL term; None: the adapters switched off, or a frozen copy of the model as it is now.
        optimizer: of the model; None: AdamW with `config.lr`.
        critic: of PPO, a `ValueModel`; None: one that starts from a copy of the model.
        critic_optimizer: None: AdamW with `config.critic_lr`.
        hooks: of `fit`, before those that are given to it.

    Raises:
        ConfigError: options do not fit together.
    """

    default: Callable[[], PolicyConfig] = staticmethod(grpo)
    estimators: tuple[str, ...] = ("reinforce", "group_mean", "rloo", "grpo", "batch_std", "reinforce_pp")

    def __init__(
        self,
        model: nn.Module,
        verifier: Verifier | Callable[..., Any] | Sequence[Verifier | Callable[..., Any]],
        config: PolicyConfig | None = None,
        *,
        tokenizer: Any = None,
        sampler: Samples | None = None,
        ref_model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        critic: nn.Module | None = None,
        critic_optimizer: torch.optim.Optimizer | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        config = self.default() if config is None else config
        if not isinstance(model, nn.Module) or not isinstance(config, PolicyConfig):
            got = f"{type(model).__name__} and {type(config).__name__}"
            raise ConfigError(f"model, config: got {got}, expected a module and a PolicyConfig")
        if config.estimator not in self.estimators:
            expected = f"{' or '.join(self.estimators)} with {type(self).__name__}"
            raise ConfigError(f"estimator: got {config.estimator!r}, expected {expected}")
        if ref_model is not None and not config.needs_reference:
            raise ConfigError("ref_model: got one with kl_loss and kl_reward at 0, expected a weight for one of them")
        self.config, self.hooks = config, list(hooks)
        self.sampler = _sampler(model, tokenizer, config) if sampler is None else sampler
        for own, name in (("temperature", "temperature"), ("max_new_tokens", "max_completion")):
            value, expected = getattr(self.sampler, own, None), getattr(config, name)
            if value not in (None, expected):
                raise ConfigError(f"sampler.{own}: got {value}, expected {name}={expected} as in the config")
        self._step = PolicyStep(
            model,
            Collector(self.sampler, VerifierScorer(verifier), config),
            config,
            optimizer=optimizer,
            reference=Reference(model, ref_model) if config.needs_reference else None,
            critic=critic,
            critic_optimizer=critic_optimizer,
        )

    @property
    def last(self) -> Rollouts | None:
        """All rollouts of the latest step."""
        return self._step.last

    def step(self, prompts: Sequence[Any], targets: Sequence[Any] | None = None) -> dict[str, float]:
        """Take one step on this rank's prompts and return its metrics.

        Args:
            prompts: see `Prompt.of`. targets: one per prompt, if the prompts are without.

        Raises:
            ConfigError: there are no prompts, or not as many targets.
        """
        prompts = Prompt.all_of(prompts)
        if targets is not None:
            if len(targets) != len(prompts):
                raise ConfigError(f"targets: got {len(targets)} for {len(prompts)} prompts, expected one for each")
            prompts = [Prompt(prompt, target) for (prompt, _), target in zip(prompts, targets, strict=True)]
        (size,) = distributed.reduce_sum(len(prompts))
        if not size:
            raise ConfigError("prompts: got none, expected at least one")
        return self._step(prompts, Plan(int(size)))

    def fit(
        self,
        data: Data | Iterable[Any],
        *,
        budget: Budget,
        schedule: Schedule | None = None,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        evaluate_every: int | None = None,
        checkpoints: Checkpoints | None = None,
        save_every: float = 60.0,
        hooks: Sequence[Hook] = (),
    ) -> Clock:
        """Train until the budget is spent, or go on from the newest checkpoint; returns how far the run is.

        Args:
            data: a `PromptData`, its like, or records to make one of. Dynamic sampling draws from it, too; the clock's
                samples are prompts without those.
            schedule: plans of prompts per step; None: `config.prompts_per_step` at a constant learning rate.
            budget, evaluate, evaluate_every, checkpoints, save_every, hooks: see `effml_shared.loop.Loop`.
        """
        source = cast(Data, data if hasattr(data, "next") else PromptData(cast(Any, data), seed=self.config.seed))
        self._step.refill = source.next
        try:
            return Loop(
                self._step,
                source,
                schedule or (lambda clock: Plan(self.config.prompts_per_step)),
                budget=budget,
                hooks=[*self.hooks, *hooks],
                evaluate=evaluate,
                evaluate_every=evaluate_every,
                checkpoints=checkpoints,
                save_every=save_every,
                seed=self.config.seed,
            ).run()
        finally:
            self._step.refill = None

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, but for the position in the data."""
        return {"step": self._step.state_dict(), "random": seeding.capture()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        self._step.load_state_dict(state["step"])
        seeding.restore(state["random"])


class GRPOTrainer(PolicyTrainer):
    """Train a policy by group-relative advantages; by its config Dr. GRPO, DAPO, GSPO, CISPO, SAPO, REINFORCE++ too."""


class RLOOTrainer(PolicyTrainer):
    """Train a policy by each sample's advantage over the mean of its group's others; default `rloo()`."""

    default = staticmethod(rloo)


class PPOTrainer(PolicyTrainer):
    """Train a policy and a critic by generalised advantages; default `ppo()`."""

    default = staticmethod(ppo)
    estimators = ("gae",)


def _sampler(model: nn.Module, tokenizer: Any, config: PolicyConfig) -> Samples:
    if tokenizer is None:
        raise ConfigError("tokenizer: got none and no sampler, expected one of them")
    return Sampler(
        unwrap(model),
        tokenizer,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        max_new_tokens=config.max_completion,
        seed=config.seed,
    )
