"""Collect rollouts: sample, score, and with dynamic sampling draw other prompts for those that teach nothing.

A sampler returns a `RolloutBatch` and its texts; a scorer gives every completion R rewards. Both are protocols: a
sampler of another kind, or rewards computed from the whole batch instead of text by text, take the place of the
ordinary ones without a change here. Verifiers get each completion with its prompt and target.

Dynamic sampling (arXiv 2503.14476, section 3.2): a prompt whose scored rewards are all equal is dropped, and as many
others are drawn in place of the dropped, until none is missing or the refills are used up. Then the batch is smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, get_args

import torch
from effml_shared import distributed
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_rl.advantages import tied_groups
from effml_rl.credit import total_rewards
from effml_rl.policy_config import PolicyConfig
from effml_rl.prompts import Prompt
from effml_rl.rank_statistics import RankRows, means
from effml_rl.rewards import stack_rewards
from effml_rl.rollout_batch import RolloutBatch
from effml_rl.verifiers.reward_functions import as_verifier
from effml_rl.verifiers.verdict import Status, Verdict, Verifier, check_verdicts

__all__ = ["Collector", "Rollouts", "Samples", "Scorer", "Scores", "VerifierScorer", "describe"]

Refill = Callable[[int], Sequence[Prompt]]
"""Return this rank's share of so many other prompts."""


class Samples(Protocol):
    """What a step asks of a sampler; `effml_rl.sampler.Sampler` is one."""

    def generate(self, prompts: Sequence[Any], n: int, *, draw: int) -> RolloutBatch: ...

    def texts(self, batch: RolloutBatch) -> list[str]: ...


class Scores(NamedTuple):
    """What completions are worth."""

    rewards: Tensor  # (rows, R) float32, NaN where not scored
    verdicts: Sequence[Sequence[Verdict]] = ()  # R times one per row, if verifiers gave the rewards


class Scorer(Protocol):
    """Scores completions, with the prompt of each."""

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], batch: RolloutBatch) -> Scores: ...


@dataclass(frozen=True, eq=False)
class Rollouts:
    """What was sampled for this rank's prompts, the rows of a prompt being neighbours."""

    prompts: Sequence[Prompt]  # one per row
    batch: RolloutBatch
    completions: Sequence[str]
    scores: Scores

    def __len__(self) -> int:
        return len(self.completions)

    def select(self, keep: Tensor) -> Rollouts:
        """Return the rows where the mask (rows,) holds."""
        chosen = keep.nonzero().flatten().tolist()
        verdicts = [[column[i] for i in chosen] for column in self.scores.verdicts]
        return Rollouts(
            [self.prompts[i] for i in chosen],
            self.batch[keep.to(self.batch.prompt_ids.device)],
            [self.completions[i] for i in chosen],
            Scores(self.scores.rewards[keep], verdicts),
        )

    @staticmethod
    def cat(parts: Sequence[Rollouts]) -> Rollouts:
        """Join rollouts; empty ones may differ in everything."""
        parts = [part for part in parts if len(part)] or list(parts[:1])
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(part.scores.verdicts for part in parts), strict=True)
        return Rollouts(
            [prompt for part in parts for prompt in part.prompts],
            RolloutBatch.cat([part.batch for part in parts]),
            [text for part in parts for text in part.completions],
            Scores(
                torch.cat([part.scores.rewards for part in parts]),
                [[v for c in column for v in c] for column in columns],
            ),
        )


class VerifierScorer:
    """Score by verifiers: one, several, or plain reward functions, which are wrapped (see `reward_functions`).

    Raises:
        ConfigError: there is none, or what is called a verifier does not return a `Verdict` per completion.
    """

    def __init__(self, verifiers: Verifier | Callable[..., Any] | Sequence[Verifier | Callable[..., Any]]) -> None:
        several = list(verifiers) if isinstance(verifiers, list | tuple) else [verifiers]
        if not several or not all(callable(verifier) for verifier in several):
            raise ConfigError(f"verifier: got {verifiers!r}, expected a verifier or reward function, or a list of them")
        self.verifiers = [as_verifier(verifier) for verifier in several]

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], batch: RolloutBatch) -> Scores:
        """Ask every verifier about every completion."""
        texts: list[Any] = [prompt.prompt for prompt in prompts]
        targets = [prompt.target for prompt in prompts]
        columns = [verifier(texts, completions, targets) for verifier in self.verifiers]
        for verdicts in columns:
            check_verdicts(verdicts, len(completions))
        rewards = stack_rewards(*[[verdict.reward for verdict in verdicts] for verdicts in columns])
        return Scores(rewards.view(len(completions), len(columns)), columns)


class Collector:
    """Turn prompts into rollouts.

    What is sampled does not depend on the number of ranks, save that a prompt which two ranks meet in one step gets
    the same completions on both.

    Attributes:
        draw: calls of the sampler so far: it makes their noise differ, and belongs into a checkpoint.
    """

    def __init__(self, sampler: Samples, scorer: Scorer, config: PolicyConfig) -> None:
        self.sampler, self.scorer, self.config, self.draw = sampler, scorer, config, 0

    def __call__(self, prompts: Sequence[Prompt], refill: Refill | None = None) -> tuple[Rollouts, Rollouts]:
        """Return all rollouts, and those to learn from.

        Their `batch.group_index` counts the prompts of this call over all ranks, in the order in which one would
        have sampled them.
        """
        first, wanted = self._sample(prompts, 0)
        if not self.config.refills:
            return first, first
        sampled, kept, drawn = [first], [self._untied(first)], wanted
        for _ in range(self.config.refills if refill is not None else 0):
            (rows,) = distributed.reduce_sum(sum(map(len, kept)))
            missing = wanted - int(rows) // self.config.samples
            if not missing or refill is None:
                break
            more, count = self._sample(refill(missing), drawn)
            sampled.append(more)
            kept.append(self._untied(more))
            drawn += count
        return Rollouts.cat(sampled), Rollouts.cat(kept)

    def _sample(self, prompts: Sequence[Prompt], drawn: int) -> tuple[Rollouts, int]:
        """Return this rank's rollouts, numbered from `drawn` on, and how many prompts all ranks had."""
        n, draw = self.config.samples, self.draw
        self.draw += 1
        with distributed.agreed("sampling and scoring"):
            found = self._scored(prompts, n, draw) if len(prompts) else None
        ranks = RankRows(len(prompts))
        (columns,) = distributed.reduce_max(0 if found is None else found.scores.rewards.shape[1])
        if found is None:
            return Rollouts([], _no_rows(), [], Scores(torch.zeros(0, int(columns)))), ranks.total
        numbers = torch.arange(len(prompts)).repeat_interleave(n) + drawn + ranks.start
        batch = replace(found.batch, group_index=numbers.to(found.batch.prompt_ids.device))
        return replace(found, batch=batch), ranks.total

    def _scored(self, prompts: Sequence[Prompt], n: int, draw: int) -> Rollouts:
        batch = self.sampler.generate([prompt.prompt for prompt in prompts], n, draw=draw)
        if len(batch) != n * len(prompts):
            raise ConfigError(f"sampler: got {len(batch)} rows, expected {n} for each of {len(prompts)} prompts")
        rows = [prompt for prompt in prompts for _ in range(n)]
        completions = self.sampler.texts(batch)
        scores = self.scorer(rows, completions, batch)
        rewards = scores.rewards.detach().cpu().float()
        if rewards.ndim != 2 or len(rewards) != len(batch):
            raise ConfigError(f"scorer: got rewards {tuple(rewards.shape)}, expected ({len(batch)}, R)")
        return Rollouts(rows, batch, completions, scores._replace(rewards=rewards))

    def _untied(self, rollouts: Rollouts) -> Rollouts:
        if not len(rollouts):
            return rollouts
        total = total_rewards(rollouts.scores.rewards, self.config.reward_weights)
        tied = tied_groups(total, self.config.samples)
        return rollouts.select(~tied.repeat_interleave(self.config.samples))


def describe(rollouts: Rollouts, config: PolicyConfig) -> dict[str, float]:
    """Return metrics of rollouts over all ranks.

    `reward` (of scored completions, verifiers weighted) and `reward_std`; `reward_0`, ... of each of several verifiers;
    `scored`, `truncated`: shares of the completions; `length`: mean tokens; `tied`: share of the prompts whose rewards
    are all equal; `prompts`: how many; `status/...`: shares of the verdicts.
    """
    rows, rewards = float(len(rollouts)), rollouts.scores.rewards.double()
    total = total_rewards(rewards, config.reward_weights)
    found = total[~total.isnan()]
    lengths = rollouts.batch.lengths
    groups = rows / config.samples
    tied = tied_groups(total, config.samples) if len(total) else total.bool()
    ones = float(distributed.rank() == 0)  # a denominator of 1: the sum over ranks
    sums: dict[str, tuple[float, float]] = {
        "reward": (float(found.sum()), len(found)),
        "reward_squared": (float(found.square().sum()), len(found)),
        "scored": (len(found), rows),
        "truncated": (float(rollouts.batch.truncated.sum()), rows),
        "length": (float(lengths.sum()), rows),
        "tokens": (float(lengths.sum()), ones),
        "tied": (float(tied.sum()), groups),
        "prompts": (groups, ones),
        "count": (len(found), ones),
    }
    for index in range(rewards.shape[1] if rewards.shape[1] > 1 else 0):
        column = rewards[:, index]
        sums[f"reward_{index}"] = (float(column.nansum()), float((~column.isnan()).sum()))
    verdicts = [verdict.status for column in rollouts.scores.verdicts for verdict in column]
    sums |= {f"status/{status}": (verdicts.count(status), len(verdicts)) for status in get_args(Status)}
    metrics = means(sums)
    count = metrics.pop("count")
    variance = (metrics.pop("reward_squared") - metrics["reward"] ** 2) * count / max(count - 1, 1)
    metrics["reward_std"] = max(variance, 0.0) ** 0.5
    return {name: value for name, value in metrics.items() if value or not name.startswith("status/")}


def _no_rows() -> RolloutBatch:
    ids, mask, row = torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.bool), torch.zeros(0)
    return RolloutBatch(ids, mask, ids, mask, row.bool(), row.long())
