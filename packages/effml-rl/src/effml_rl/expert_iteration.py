"""Expert Iteration (rejection-sampling fine-tuning): learn, again and again, from one's own verified completions.

Round j: the model samples k completions per prompt; those that a verifier accepts are kept, exact duplicates (same
prompt, same completion) once; the base weights, or the model's own, are fine-tuned on them; that is the next model. For
a policy that can be any distribution over completions, and without the deduplication, a round maps pi to
pi r / E[r]: one round reaches the fixed point. Deduplication favours whatever can be said in many ways.

A round is one `Step` of `effml_shared.loop.Loop`, whose samples are prompts; its fine-tuning is another `Loop` inside,
with a fresh optimizer. A round follows from the weights, the prompts and its number alone: a killed run resumes at the
start of its round and does the same again. Where no prompt comes twice, the rows do not depend on the number of ranks.

State: model and base weights. Cost of a round: prompts x k completions, then epochs over the rows kept.
Source: as arXiv 2504.07912 configures it (k 64, lr 1e-4, batch 256, 2 epochs, cosine to a tenth). To leave out
completions that were cut off is our own: they would teach not to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from effml_shared import distributed
from effml_shared.checkpoint import Checkpoints
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.data import Loader
from effml_shared.errors import CheckpointError, ConfigError, Interrupted
from effml_shared.generation import unwrap
from effml_shared.loop import Budget, Hook, Loop
from effml_shared.schedules import Clock, Plan, cosine
from effml_shared.seeding import derive_seed
from effml_shared.steps import GradientStep
from torch import nn

from effml_rl.prompts import Prompt, PromptData
from effml_rl.rollouts import Samples, VerifierScorer
from effml_rl.sampler import Sampler
from effml_rl.supervised import SupervisedDataset, supervised_loss
from effml_rl.verified_rows import VerifiedRows, from_all_ranks
from effml_rl.verifiers.verdict import Verifier

__all__ = ["ExpertIteration", "ExpertIterationConfig"]


@dataclass(frozen=True, kw_only=True)
class ExpertIterationConfig:
    """One round: sampling, what is kept, and the fine-tuning.

    Raises:
        ConfigError: a field is out of range.
    """

    # Sampling
    samples: int = 64  # completions per prompt
    temperature: float = 1.0
    top_p: float = 0.95  # mass kept
    max_completion: int = 512  # tokens, after which a completion is cut off
    prompts_per_call: int = 64  # whose completions are in memory at a time
    seed: int = 0  # of the sampling noise and of the order of rows

    # What is kept
    min_reward: float = 1.0  # of each verifier
    deduplicate: bool = True
    keep_truncated: bool = False
    max_length: int | None = None  # tokens of prompt and completion; longer rows are left out. None: no limit

    # Fine-tuning
    continue_from_last: bool = False  # start from the model's own weights, not from those before the first round
    epochs: int = 2
    batch_size: int = 256  # rows per update
    micro_batch: int | None = None  # rows per forward pass and rank; None: all
    lr: float = 1e-4  # peak, of the AdamW that is made where no optimizer is given
    warmup: float = 0.0  # fraction of a round's rows
    floor: float = 0.1  # fraction of the learning rate that the cosine ends at
    clip_norm: float | None = 1.0  # largest gradient norm; None: no clipping
    precision: str = "float32"  # or bfloat16: autocast of the forward pass

    def __post_init__(self) -> None:
        for name in ("samples", "max_completion", "prompts_per_call", "epochs", "batch_size"):
            check_count(name, getattr(self, name), 1)
        for name, least in (("max_length", 2), ("micro_batch", 1)):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least)
        check_range("warmup", self.warmup, 0.0, 1.0)
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"floor: got {self.floor}, expected a fraction in [0, 1]")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"clip_norm: got {self.clip_norm}, expected a number > 0 or None")
        check_range("lr", self.lr, 0.0)
        check_choice("precision", self.precision, ("float32", "bfloat16"))
        check_range("temperature", self.temperature, 0.0)
        if not self.temperature:
            raise ConfigError(f"temperature: got {self.temperature}, expected a number > 0: greedy samples are all one")


class ExpertIteration:
    """A `Step` whose batch is a list of prompts and whose update is a round.

    Args:
        model: a causal language model; its weights now are the base.
        verifier: judges completions, or a plain reward function, or a list of them: what all accept is kept.
        tokenizer: for prompts that are texts, and for the verifier.
        sampler: in place of the ordinary one, and of the fields of `config` about sampling save `samples`.
        optimizer: makes the optimizer of a round; None: AdamW without weight decay.
        hooks: watch the fine-tuning of every round.

    Attributes:
        round: rounds done.

    Raises:
        ConfigError: there is neither tokenizer nor sampler, or no verifier.
    """

    def __init__(
        self,
        model: nn.Module,
        verifier: Verifier | Callable[..., Any] | Sequence[Verifier | Callable[..., Any]],
        config: ExpertIterationConfig | None = None,
        *,
        tokenizer: Any = None,
        sampler: Samples | None = None,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
        hooks: Sequence[Hook] = (),
    ) -> None:
        if tokenizer is None and sampler is None:
            raise ConfigError("tokenizer: got none and no sampler, expected one of them")
        self.config = config = config or ExpertIterationConfig()
        self.model, self.scorer, self.hooks, self.round = model, VerifierScorer(verifier), list(hooks), 0
        self.sampler = sampler or Sampler(
            unwrap(model),
            tokenizer,
            temperature=config.temperature,
            top_p=config.top_p,
            max_new_tokens=config.max_completion,
            seed=config.seed,
        )
        self.optimizer = optimizer or (lambda m: torch.optim.AdamW(_trainable(m), lr=config.lr, weight_decay=0.0))
        self._base = None if config.continue_from_last else deepcopy(unwrap(model).state_dict())

    def fit(
        self,
        data: PromptData | Iterable[Any],
        rounds: int,
        *,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        checkpoints: Checkpoints | None = None,
        hooks: Sequence[Hook] = (),
    ) -> Clock:
        """Run so many rounds over all prompts, or go on from the newest checkpoint; returns how far the run is.

        Args:
            data: a `PromptData`, or records to make one of.
            evaluate, checkpoints: called, and written, after every round.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a round that was being fine-tuned is not saved.
        """
        check_count("rounds", rounds, 1)
        source = data if isinstance(data, PromptData) else PromptData(data, seed=self.config.seed)
        plan = Plan(batch_size=len(source))
        loop = Loop(
            self,
            source,
            lambda clock: plan,
            budget=Budget(steps=rounds),
            hooks=hooks,
            evaluate=evaluate,
            evaluate_every=len(source),
            checkpoints=checkpoints,
            save_every=0.0,
            seed=self.config.seed,
        )
        return loop.run()

    def step(self, prompts: Sequence[Any]) -> dict[str, float]:
        """Do a round on this rank's prompts, as `Prompt.of` takes them: see `__call__`."""
        asked = Prompt.all_of(prompts)
        return self(asked, Plan(batch_size=max(len(asked), 1)))

    def __call__(self, batch: Sequence[Prompt], plan: Plan) -> dict[str, float]:
        """Do a round on this rank's share of the prompts. If no completion is kept, the model stays as it is.

        Returns:
            `verified`, `truncated`: shares of the completions; `solved`: share of the prompts with one verified;
            `kept`: rows to learn from; `duplicates`, `too_long`: rows left out; `updates`, `tokens` and `loss` (of the
            last update, nats per token) of the fine-tuning.

        Raises:
            NonFiniteError: the fine-tuning diverged.
        """
        config = self.config
        kept = VerifiedRows(
            deduplicate=config.deduplicate, keep_truncated=config.keep_truncated, max_length=config.max_length
        )
        with distributed.agreed("sampling and verifying"):
            for start in range(0, len(batch), config.prompts_per_call):
                prompts = batch[start : start + config.prompts_per_call]
                rollouts = self.sampler.generate([given.prompt for given in prompts], config.samples, draw=self.round)
                asked = [prompts[group] for group in rollouts.group_index.tolist()]
                scores = self.scorer(asked, self.sampler.texts(rollouts), rollouts)
                kept.add(rollouts, (scores.rewards >= config.min_reward).all(1))
        metrics = kept.metrics()
        rows = from_all_ranks(kept.prompts), from_all_ranks(kept.completions)
        if rows[0]:
            metrics |= self._fine_tune(SupervisedDataset(*rows))
        self.round += 1
        return metrics

    def _fine_tune(self, dataset: SupervisedDataset) -> dict[str, float]:
        config, total, last = self.config, self.config.epochs * len(dataset), _LastMetrics()
        if self._base is not None:
            unwrap(self.model).load_state_dict(self._base)
        step = GradientStep(
            self.model,
            self.optimizer(self.model),
            supervised_loss,
            micro_batch=config.micro_batch,
            clip_norm=config.clip_norm,
            precision=config.precision,
        )
        seed = derive_seed(config.seed, "expert iteration", self.round)
        loop = Loop(
            step,
            Loader(dataset, seed=seed, rank=distributed.rank(), world_size=distributed.world_size()),
            cosine(config.batch_size, total, warmup=int(config.warmup * total), floor=config.floor),
            budget=Budget(samples=total),
            hooks=[last, *self.hooks],
            seed=seed,
        )
        try:
            clock = loop.run()
        except Interrupted as stop:
            place = f"stopped in round {self.round + 1}"
            raise Interrupted(f"{place}; what is saved is the end of the round before it", stop.signum) from None
        return {"updates": clock.step, "tokens": clock.tokens, "loss": last.metrics["loss"]}

    def state_dict(self) -> dict[str, Any]:
        """Return the number of rounds done, and the weights."""
        return {"round": self.round, "model": unwrap(self.model).state_dict(), "base": self._base}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            CheckpointError: it is of a run that starts its rounds from other weights.
        """
        if (state["base"] is None) != (self._base is None):
            got, expected = state["base"] is None, self.config.continue_from_last
            raise CheckpointError(f"continue_from_last: got a state of {got}, expected one of {expected}")
        self.round, self._base = state["round"], deepcopy(state["base"])
        unwrap(self.model).load_state_dict(state["model"])


class _LastMetrics(Hook):
    """Remember the metrics of the latest update."""

    metrics: Mapping[str, float]

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        self.metrics = metrics


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError("model: got one whose parameters are all frozen, expected some to train")
    return trained
