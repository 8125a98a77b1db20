"""One policy-gradient step: collect rollouts, assign credit, update. A `Step` of `effml_shared.loop.Loop`.

    prompts -> rollouts (sample, score) -> experience (advantages, old log-probabilities) -> updates

Updates are epochs x mini-batches of `GradientStep`, for the policy and, if there is one, for the critic.

Sums over an update are divided by its normaliser once, over all micro-batches and ranks, so that neither changes the
gradient. What is not needed is not computed: no log-probabilities of the old policy where there is one update, no
reference without a KL term, no pass for completions whose gradient is exactly 0 (advantage 0 and no penalty; their
tokens stay in the normaliser, and metrics of tokens are without them). If none is left the update is skipped: the
weights stay as they are, to the bit, whatever the momentum; the metric `skipped` says so.

Cost per step, N weights: sampling 2N per token, 6N per token of the kept completions and their prompts per epoch, 2N
each for old and reference log-probabilities if they are needed; prompts count once per group where the model allows
it, see `effml_rl.shared_prompts`. State: see `state_dict`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from effml_shared import distributed, seeding
from effml_shared.errors import ConfigError
from effml_shared.products import fast_products
from effml_shared.schedules import Plan
from effml_shared.steps import GradientStep
from torch import Tensor, nn

from effml_rl.aggregation import count_terms
from effml_rl.experience import Experience
from effml_rl.policy_config import PolicyConfig
from effml_rl.policy_objective import PolicyObjective
from effml_rl.policy_passes import Rows, ordered, select, without_dropout
from effml_rl.prompts import Prompt
from effml_rl.rank_statistics import RankRows
from effml_rl.reference import Reference
from effml_rl.rollouts import Collector, Rollouts, describe
from effml_rl.value_model import ValueModel, ValueObjective

__all__ = ["PolicyStep"]

_log = logging.getLogger(__name__)


class PolicyStep:
    """Sample, score, update.

    Args:
        model: a causal language model; wrap it (DDP, FSDP2) before the optimizer is built. Its dropout is set to 0.
        collect: makes rollouts of prompts.
        config: see `PolicyConfig`.
        optimizer: any torch optimizer of the model; None: AdamW with `config.lr`, betas 0.9 and 0.95, no decay.
        reference: of the KL term, made of the model as it is now if there is none.
        critic: of the estimator `"gae"`, made of the model as it is now if there is none (`ValueModel.of`).
        critic_optimizer: None: AdamW with `config.critic_lr`.

    Attributes:
        last: all rollouts of the latest step, for hooks.
        refill: where dynamic sampling gets more prompts; the trainer sets it to the data of the loop.

    Raises:
        ConfigError: a critic is given to an estimator that has no use for it.
    """

    def __init__(
        self,
        model: nn.Module,
        collect: Collector,
        config: PolicyConfig,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        reference: Reference | None = None,
        critic: nn.Module | None = None,
        critic_optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if critic is not None and config.estimator != "gae":
            raise ConfigError(f"critic: got one with estimator {config.estimator!r}, expected None: it is of 'gae'")
        replicated = isinstance(model, nn.parallel.DistributedDataParallel)
        if distributed.world_size() > 1 and not replicated and distributed.mesh_of(model) is None:
            raise ConfigError("model: got one that is not data-parallel among several processes, expected DDP or FSDP2")
        without_dropout(model)
        self.model, self.collect, self.config = model, collect, config
        self.objective = PolicyObjective(config)
        self.reference = (reference or Reference(model)) if config.needs_reference else None
        shared: dict[str, Any] = {name: getattr(config, name) for name in ("clip_norm", "micro_batch", "precision")}
        self.policy = GradientStep(model, optimizer or _adamw(model, config.lr), self.objective, **shared)
        self.critic: GradientStep | None = None
        if config.estimator == "gae":
            critic = distributed.parallelize(ValueModel.of(model), "ddp") if critic is None else critic
            without_dropout(critic)
            optimizer = critic_optimizer or _adamw(critic, config.critic_lr)
            self.critic = GradientStep(critic, optimizer, ValueObjective(config), **shared)
        self.experience = Experience(model, config, self.reference, critic)
        self.last: Rollouts | None = None
        self.refill: Callable[[int], Sequence[Prompt]] | None = None

    def __call__(self, batch: Sequence[Any], plan: Plan) -> dict[str, float]:
        """Update from this rank's prompts, see `Prompt.of`; returns the metrics of `describe` and of the updates.

        `policy_loss`, a surrogate, and `grad_norm` (means over the updates), `lr`, `skipped` (share of the updates),
        `value_loss`, `explained_variance`, and what `PolicyObjective` gathers. `tokens` are those sampled.

        Raises:
            EffmlError: no completion was scored, or all were cut off and are masked.
            NonFiniteError: the loss or a gradient is NaN or infinite.
        """
        with _unsharded(self.model):
            sampled, used = self.collect(Prompt.all_of(batch), self.refill)
        self.last = sampled
        metrics = describe(sampled, self.config)
        (rows,) = distributed.reduce_sum(len(used))
        if not rows:
            _log.warning("all prompts are tied, after %d refills: nothing to learn from", self.config.refills)
        with fast_products():
            experience, more = self.experience(used, plan.precision or self.config.precision)
            updates = self._update(experience, plan)
        return {**metrics, **more, **updates}

    def _update(self, rows: Rows, plan: Plan) -> dict[str, float]:
        """Go over the rows in epochs and mini-batches."""
        self.objective.reset()
        policy: list[dict[str, float]] = []
        critic: list[dict[str, float]] = []
        skipped = 0
        for part in self._mini_batches(rows["group"]):
            live, tokens = distributed.reduce_sum(float(rows["live"][part].sum()), float(rows["loss_mask"][part].sum()))
            if live:
                policy.append(self.policy(self._assembled(rows, part), plan))
            else:
                skipped += 1
            if self.critic is not None and tokens:
                counted = part[rows["loss_mask"][part].any(1)]
                chosen = select(rows, counted)
                critic.append(self.critic(select(chosen, ordered(chosen)), plan))
        base = float(self.policy.optimizer.param_groups[0]["initial_lr"])
        metrics = {
            "policy_loss": _mean(policy, "loss"),
            "grad_norm": _mean(policy, "grad_norm"),
            "lr": base * plan.lr_factor,
            "skipped": skipped / self.config.updates,
            **self.objective.metrics(),
        }
        if self.critic is not None:
            metrics |= {"value_loss": _mean(critic, "loss"), "value_grad_norm": _mean(critic, "grad_norm")}
        return metrics

    def _mini_batches(self, group: Tensor) -> Iterator[Tensor]:
        """Yield this rank's rows of each mini-batch: which these are does not depend on the number of ranks."""
        rows, count = torch.arange(len(group), device=group.device), self.config.mini_batches
        if count == 1:
            yield from [rows] * self.config.epochs
            return
        keys = (group * self.config.samples + rows % self.config.samples).cpu()  # in the order of a single process
        everywhere = RankRows(len(keys)).gather(keys).sort().values
        place = torch.searchsorted(everywhere, keys)
        for epoch in range(self.config.epochs):
            stream = seeding.generator(self.config.seed, "mini-batches", self.collect.draw, epoch)
            shuffled = torch.randperm(len(everywhere), generator=stream)
            for part in shuffled.tensor_split(count):
                yield torch.isin(place, part).nonzero().flatten().to(group.device)

    def _assembled(self, rows: Rows, part: Tensor) -> Rows:
        """Return the live rows of a part, the first of which carries the normaliser's terms of the others."""
        live = rows["live"][part]
        chosen, others = part[live], part[~live]
        mask, reduction = rows["loss_mask"], self.config.token_reduction
        terms = count_terms(mask[others], reduction).double()
        if not len(chosen) and len(others):  # a row without counted tokens must carry them
            chosen = others[:1]
            terms = terms - count_terms(torch.zeros_like(mask[chosen]), reduction)
            mask = mask & rows["live"].unsqueeze(1)
        result = select({**rows, "loss_mask": mask}, chosen)
        result = select(result, ordered(result))
        result["left_out"] = terms.new_zeros(len(chosen))
        result["left_out"][:1] = terms
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return model, optimizer, critic, a reference copied here, and how often was sampled."""
        return {
            "policy": self.policy.state_dict(),
            "critic": None if self.critic is None else self.critic.state_dict(),
            "reference": None if self.reference is None else self.reference.state_dict(),
            "draw": self.collect.draw,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back a state.

        Raises:
            CheckpointError: it belongs to another model.
        """
        self.policy.load_state_dict(state["policy"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        if self.reference is not None:
            self.reference.load_state_dict(state["reference"])
        self.collect.draw = state["draw"]


@contextlib.contextmanager
def _unsharded(model: nn.Module) -> Iterator[None]:
    """Keep the parameters of an FSDP2 model whole: ranks that decode different numbers of tokens must not wait."""
    if distributed.mesh_of(model) is None:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    try:
        for part in parts:
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)  # PyTorch's default: all but the root
            part.reshard()


def _adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError("model: got one whose parameters are all frozen, expected some to train")
    return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def _mean(found: list[dict[str, float]], name: str) -> float:
    return sum(metrics[name] for metrics in found) / max(len(found), 1)
