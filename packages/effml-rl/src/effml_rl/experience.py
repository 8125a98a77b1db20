"""Experience: rollouts turned into the rows of tensors that a policy's and a critic's losses read.

Rows are those of `effml_rl.policy_passes`, with

    advantages   (rows, 1) or (rows, T)   credit, see `effml_rl.credit`
    live         (rows,) bool             whether a row has a gradient: an advantage, or a penalty on its tokens
    old_logps    (rows, T)                before the first of several updates
    ref_logps    (rows, T)                for a KL term in the loss
    values, returns  (rows, T)            of the critic

Passes without gradient are made only where a number is used: none at all for one update without KL term and critic.
Cost: 2N per token and pass, N weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from effml_shared import distributed
from effml_shared.errors import ConfigError, EffmlError
from torch import Tensor, nn

from effml_rl.credit import assign_credit, total_rewards
from effml_rl.kl import kl
from effml_rl.policy_config import PolicyConfig
from effml_rl.policy_passes import Rows, map_tokens, policy_logps, select, sequences
from effml_rl.rank_statistics import means
from effml_rl.reference import Reference
from effml_rl.rollouts import Rollouts
from effml_rl.value_model import explained_variance

__all__ = ["Experience"]


class Experience:
    """Make rows of rollouts.

    Args:
        model: the policy. reference: of the KL term, if there is one. critic: of the estimator `"gae"`.
    """

    def __init__(
        self, model: nn.Module, config: PolicyConfig, reference: Reference | None, critic: nn.Module | None
    ) -> None:
        self.model, self.config, self.reference, self.critic = model, config, reference, critic

    def __call__(self, rollouts: Rollouts, precision: str) -> tuple[Rows, dict[str, float]]:
        """Return this rank's rows, and metrics.

        Raises:
            EffmlError: there are completions, and none of any rank is to be learnt from.
            ConfigError: the sampler did not store log-probabilities that are needed.
        """
        config, device = self.config, next(self.model.parameters()).device
        batch = rollouts.batch.to(device)
        rows = {
            "prompt_ids": batch.prompt_ids,
            "prompt_mask": batch.prompt_mask,
            "completion_ids": batch.completion_ids,
            "loss_mask": self._loss_mask(rollouts).to(device),
            "group": batch.group_index,
        }
        mask = rows["loss_mask"]
        if config.mismatch is not None or (config.old_logps == "sampler" and config.updates > 1):
            if batch.sampler_logps is None and len(batch):
                raise ConfigError("sampler_logps: got rollouts without them, expected them with mismatch or old_logps")
            rows["sampler_logps"] = (
                torch.zeros(mask.shape, device=device) if batch.sampler_logps is None else batch.sampler_logps
            )
        logps, penalty, values, metrics = None, None, None, {}
        if self.reference is not None and config.kl_reward:
            logps = self._logps(rows, precision)
            penalty = kl(logps, self._reference_logps(self.reference, rows, precision), "k1", mask=mask)
            metrics = means({"kl_k1": (float(penalty.sum()), float(mask.sum()))})
        if self.critic is not None:
            critic = self.critic
            with self._autocast(precision):
                values = map_tokens(lambda part: critic(*sequences(part)), rows, config.micro_batch)
        credit = assign_credit(rollouts.scores.rewards, batch.lengths, mask, config, kl=penalty, values=values)
        rows["advantages"] = credit.advantages
        if values is not None and credit.returns is not None:
            rows |= {"values": values, "returns": credit.returns}
            metrics["explained_variance"] = explained_variance(values, credit.returns, mask)
        rows["live"] = mask.any(1) if config.penalised else (mask & (rows["advantages"] != 0)).any(1)
        if config.updates > 1:
            if config.old_logps == "sampler":
                logps = rows["sampler_logps"]
            elif logps is None:
                logps = _of_live(rows, lambda part: self._logps(part, precision))
            rows["old_logps"] = logps
        if self.reference is not None and config.kl_loss:
            reference = self.reference
            rows["ref_logps"] = _of_live(rows, lambda part: self._reference_logps(reference, part, precision))
        return rows, metrics

    def _loss_mask(self, rollouts: Rollouts) -> Tensor:
        """Return the tokens to learn from, (rows, T)."""
        batch, total = rollouts.batch, total_rewards(rollouts.scores.rewards, self.config.reward_weights)
        unscored = total.isnan().to(batch.completion_mask.device)
        cut_off = batch.truncated & ~unscored & self.config.mask_truncated
        counts = distributed.reduce_sum(len(total), float(unscored.sum()), float(cut_off.sum()))
        rows, never, cut = map(int, counts)
        if rows and never + cut == rows:
            raise EffmlError(
                f"got {never} completions without a reward and {cut} cut off and masked, of {rows}: "
                "expected at least one to learn from; look at the verifier, or raise max_completion"
            )
        return batch.completion_mask & ~(unscored | cut_off).unsqueeze(1)

    def _logps(self, rows: Rows, precision: str) -> Tensor:
        self.model.train()  # as in the update
        return self._pass(self.model, rows, precision)

    def _reference_logps(self, reference: Reference, rows: Rows, precision: str) -> Tensor:
        with reference.active() as model:
            return self._pass(model, rows, precision)

    def _pass(self, model: nn.Module, rows: Rows, precision: str) -> Tensor:
        """Return log-probabilities (rows, T) without gradient."""
        temperature, chunk = self.config.temperature, self.config.logit_chunk

        def logps(part: Rows) -> Tensor:
            return policy_logps(model, part, temperature=temperature, chunk=chunk).logps

        with self._autocast(precision):
            return map_tokens(logps, rows, self.config.micro_batch)

    def _autocast(self, precision: str) -> torch.autocast:
        device = next(self.model.parameters()).device
        return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def _of_live(rows: Rows, function: Callable[[Rows], Tensor]) -> Tensor:
    """Return what a function gives for the rows that have a gradient, among zeros for the others, (rows, T)."""
    live = rows["live"].nonzero().flatten()
    found = function(select(rows, live))
    result = found.new_zeros(rows["loss_mask"].shape)
    result[live] = found
    return result
