"""What `rl.wall` trains on: a world and its problems, the sizes of its trainings, and the policy that a seed keeps.

The world is one for all seeds; its problems, the initial weights and all sampling are others with every seed. The few
problems of reinforcement are the first of the many.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from effml_shared import distributed, seeding
from effml_shared.checks import check_count, check_range
from effml_shared.errors import ConfigError
from effml_shared.schedules import Clock, Plan
from effml_shared.transformer import Transformer, TransformerConfig
from numpy.typing import NDArray
from torch import nn

from effml_rl.policy_config import PolicyConfig
from effml_rl.rollout_batch import completion_mask
from effml_rl.sampler import Sampler
from effml_rl.solution_tree import SolutionTreeDataset, SolutionTreeTask, solvable
from effml_rl.solution_tree.examples import Examples
from effml_rl.supervised import SupervisedDataset
from effml_rl.tree_file import load_tree, save_tree

__all__ = ["FineTuning", "Reinforcement", "Setting", "World"]

_KIND = "rl.wall policy 1"


@dataclass
class World:
    """A solution-tree world and how many problems of each kind there are."""

    size: int = 6  # of each of states, actions, contexts and problem states
    shortest: int = 2  # actions of a path
    longest: int = 3
    irrelevant: int = 0  # noise integers per prompt
    alpha: float = 0.3  # concentration of the actions per state in fine-tuning: small for strong shortcuts
    beta: float = 0.3  # concentration of the contexts per action
    seed: int = 0  # of the tables
    sft_problems: int = 20_000
    test_problems: int = 128
    known: int = 30  # occurrences in fine-tuning from which on the effect of a (state, action) pair counts as known

    def __post_init__(self) -> None:
        for name in ("sft_problems", "test_problems", "known"):
            check_count(name, getattr(self, name), 1)
        self.task(0)

    def task(self, seed: int) -> SolutionTreeTask:
        """Return this world with the problems of a seed."""
        own = SolutionTreeTask(
            n_states=self.size,
            n_actions=self.size,
            n_contexts=self.size,
            n_problem=self.size,
            len_range=(self.shortest, self.longest),
            n_irrelevant=self.irrelevant,
            alpha=self.alpha,
            beta=self.beta,
            seed=self.seed,
        )
        return replace(own, seed=seed, world=own.tables)


@dataclass
class FineTuning:
    """On prompts with their solutions; all tokens count, the prompts' too.

    How soon a network sees beyond the shortcuts differs much between seeds; `until` lets all start alike.
    """

    steps: int = 1200  # at most
    until: float | None = 0.85  # stops at this accuracy on new problems with shortcuts; None: never before the end
    evaluate_every: int = 25  # steps
    batch_size: int = 64
    lr: float = 2e-3  # peak, of AdamW without weight decay
    warmup: float = 0.05  # share of the samples over which the rate rises; then it falls linearly to 0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        check_count("steps", self.steps, 1)
        check_count("evaluate_every", self.evaluate_every, 1)
        check_count("batch_size", self.batch_size, 1)
        if self.until is not None and not 0 < self.until <= 1:
            raise ConfigError(f"until: got {self.until}, expected an accuracy above 0, at most 1, or None")
        check_range("lr", self.lr, 0.0)
        check_range("warmup", self.warmup, 0.0, 1.0)
        if not self.clip_norm > 0:
            raise ConfigError(f"clip_norm: got {self.clip_norm}, expected a number > 0")

    @property
    def samples(self) -> int:
        return self.steps * self.batch_size

    def plan(self, clock: Clock) -> Plan:
        """Return the batch and the rate of a step."""
        rising = self.warmup * self.samples
        factor = min(
            (clock.samples + self.batch_size) / max(rising, self.batch_size),
            (self.samples - clock.samples) / (self.samples - rising),
        )
        return Plan(self.batch_size, factor)


@dataclass
class Reinforcement:
    """By GRPO; what else is trained on has the same steps, rate and number of completions."""

    few: int = 32  # problems of one policy
    many: int = 512  # problems of the other
    steps: int = 200
    prompts: int = 16  # per step
    completions: int = 12  # per prompt
    lr: float = 1e-4  # constant, of AdamW without weight decay
    epochs: int = 1  # over the completions of a step
    kl: float = 0.0  # weight of the KL divergence from the fine-tuned policy in the loss, k3, per nat
    entropy: float = 0.0  # weight of the entropy bonus, per nat
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        check_count("few", self.few, 1)
        check_count("steps", self.steps, 1)
        if self.many <= self.few:
            raise ConfigError(f"many: got {self.many}, expected more than few={self.few}")
        self.policy(1, 0)

    @property
    def samples(self) -> int:
        """What the loop counts in a training: prompts."""
        return self.steps * self.prompts

    def policy(self, longest: int, seed: int) -> PolicyConfig:
        """Return the settings of the trainer for completions of at most `longest` tokens."""
        return PolicyConfig(
            prompts_per_step=self.prompts,
            samples=self.completions,
            max_completion=longest,
            lr=self.lr,
            epochs=self.epochs,
            kl_loss=self.kl,
            kl_kind="k3",
            entropy=self.entropy,
            clip_norm=self.clip_norm,
            log_entropy=False,
            seed=seed,
        )


class Setting:
    """What the trainings of one seed share; problems and policy are made when they are needed."""

    def __init__(self, world: World, model: TransformerConfig, rl: Reinforcement, seed: int, directory: Path) -> None:
        self.world, self.rl, self.seed = world, rl, seed
        self.task = world.task(seed)
        rows = self.task.tokenizer.vocab_size
        self.model_config = replace(model, vocab_size=rows, vocab_rows=rows)
        self.policy_file = directory / f"seed={seed}.safetensors"

    @cached_property
    def problems(self) -> SolutionTreeDataset:
        return SolutionTreeDataset.make(self.task, self.world.sft_problems, self.rl.many, self.world.test_problems)

    @cached_property
    def few(self) -> Examples:
        """The problems that both policies are reinforced on."""
        return self.problems.rl.select(slice(0, self.rl.few))

    def known(self, examples: Examples) -> NDArray[np.bool_]:
        """Return of which problems (problems,) the right path has only pairs whose effect is known."""
        sft, pairs = self.problems.sft, np.zeros_like(self.task.tables.transitions)
        on_path = sft.actions >= 0
        np.add.at(pairs, (sft.states[:, :-1][on_path], sft.actions[on_path]), 1)
        return solvable(examples, pairs >= self.world.known)

    @cached_property
    def shortcuts(self) -> SupervisedDataset:
        """Problems with their solutions, actions and contexts skewed."""
        tokenizer, examples = self.task.tokenizer, self.problems.sft
        completions = examples.completions(tokenizer)
        counted, _ = completion_mask(completions, tokenizer.eos_id)
        return SupervisedDataset.from_padded(
            *examples.prompts(tokenizer), completions, counted, prompt_loss=True, pad_id=tokenizer.pad_id
        )

    def network(self) -> Transformer:
        """Return an untrained network on the default device."""
        seed = seeding.derive_seed(self.seed, "model")
        return Transformer(self.model_config, seed=seed).to(distributed.default_device())

    def policy(self) -> Transformer:
        """Return the fine-tuned network, as it was kept."""
        model = self.network()
        model.load_state_dict(load_tree(self.policy_file, _KIND))
        return model

    def keep(self, model: nn.Module) -> None:
        """Write the fine-tuned network to its file."""
        with distributed.agreed("keeping the fine-tuned policy"):
            if distributed.is_main():
                save_tree(self.policy_file, _KIND, model.state_dict())

    def sampler(self, model: nn.Module, purpose: str, max_rows: int) -> Sampler:
        """Return a sampler whose noise belongs to the seed and a purpose."""
        return Sampler(
            model,
            self.task.tokenizer,
            max_new_tokens=self.task.completion_length,
            seed=seeding.derive_seed(self.seed, purpose),
            max_rows=max_rows,
            keep_end=True,
        )
