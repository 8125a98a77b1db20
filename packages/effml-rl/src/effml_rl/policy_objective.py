"""The loss of a policy on rows of rollouts, as a sum and a count for `effml_shared.steps.GradientStep`.

    sum over tokens of  w_t l_t + beta kl_t - c H_t    with l the policy loss, w the mismatch weight, H the entropy

One forward pass, at completion tokens only. Log-probabilities before the update and of the reference come with the
rows; where there are no old ones the update is the first from these rollouts, and the ratio is exactly 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from effml_shared import distributed
from effml_shared.errors import ConfigError
from effml_shared.tensors import widen
from torch import Tensor, nn

from effml_rl.importance_weights import importance_ratio, mismatch_weights
from effml_rl.kl import kl
from effml_rl.policy_config import PolicyConfig
from effml_rl.policy_loss import policy_loss, policy_metrics
from effml_rl.policy_passes import Rows, placeholder, policy_logps, trimmed
from effml_rl.rank_statistics import means

__all__ = ["PolicyObjective"]


class PolicyObjective:
    """A `Loss` of `GradientStep`, which also gathers metrics.

    Rows are those of `effml_rl.policy_passes` with `advantages` (rows, 1) or (rows, T), and where asked for
    `old_logps`, `ref_logps`, `sampler_logps` (rows, T) and `left_out` (rows,): terms of the normaliser that belong to
    rows which were left out because their gradient is 0.
    """

    def __init__(self, config: PolicyConfig) -> None:
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Forget the metrics."""
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._tokens: list[Tensor] = []
        self._largest: list[Tensor] = []

    def __call__(self, model: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return the sum, with its gradient, and the count."""
        config = self.config
        options: dict[str, Any] = {"temperature": config.temperature, "chunk": config.logit_chunk}
        if not len(rows["loss_mask"]):
            nothing = policy_logps(model, placeholder(rows["loss_mask"].device), **options).logps
            return nothing.sum() * 0.0, nothing.new_zeros(())
        rows = trimmed(rows)
        mask, advantages, old_logps = rows["loss_mask"], rows["advantages"], rows.get("old_logps")
        wanted = "gradient" if config.entropy else "value" if config.log_entropy else "none"
        logps, entropy = policy_logps(model, rows, **options, entropy=wanted)
        before = logps.detach() if old_logps is None else old_logps
        if wanted != "none":
            self._record(mask, entropy=entropy)

        penalty = None
        if config.kl_loss:
            ratio = importance_ratio(logps, before, mask) if config.kl_kind == "k3_corrected" else None
            penalty = config.kl_loss * kl(logps, rows["ref_logps"], config.kl_kind, mask=mask, ratio=ratio)
        if config.entropy:
            penalty = (0.0 if penalty is None else penalty) - config.entropy * entropy
        total, count = policy_loss(
            logps,
            old_logps,
            advantages,
            mask,
            config.loss,
            clip=config.clip,
            delta=config.delta,
            dual_clip=config.dual_clip,
            weight=self._mismatch(before, rows, mask),
            penalty=penalty,
            reduction=config.token_reduction,
            max_len=config.max_len,
        )
        self._watch(logps.detach(), old_logps, rows, mask)
        return total, count + rows["left_out"].sum()

    def metrics(self) -> dict[str, float]:
        """Return means over the tokens of all updates and ranks since the last `reset`."""
        tokens = float(sum(self._tokens)) if self._tokens else 0.0
        result = means({name: (float(sum(self._sums[name])), tokens) for name in self._names()})
        if self.config.updates > 1:
            (largest,) = distributed.reduce_max(max(map(float, self._largest), default=0.0))
            result["ratio_max"] = largest
        return result

    def _names(self) -> list[str]:
        """Return what is recorded, the same on ranks that had no rows."""
        config = self.config
        names = ["entropy"] if config.entropy or config.log_entropy else []
        names += ["kl_k1", "kl_k3"] if config.kl_loss else []
        names += ["mismatch_ratio", "mismatch_weight"] if config.mismatch else []
        if config.updates > 1:
            names += ["ratio", "old_kl"] + (["clip_low", "clip_high"] if config.loss in ("ppo", "gspo") else [])
        return names

    def _mismatch(self, before: Tensor, rows: Rows, mask: Tensor) -> Tensor | None:
        config = self.config
        if config.mismatch is None:
            return None
        if "sampler_logps" not in rows:
            raise ConfigError("mismatch: got rollouts without sampler_logps, expected a sampler that stores them")
        weights = mismatch_weights(
            before,
            rows["sampler_logps"],
            mask,
            kind=config.mismatch,
            level=config.mismatch_level,
            cap=config.mismatch_cap,
            floor=config.mismatch_floor,
        )
        raw = mismatch_weights(before, rows["sampler_logps"], mask, cap=math.inf)
        self._record(mask, mismatch_ratio=raw, mismatch_weight=weights.expand(mask.shape))
        return weights

    @torch.no_grad()
    def _watch(self, logps: Tensor, old_logps: Tensor | None, rows: Rows, mask: Tensor) -> None:
        self._tokens.append(mask.sum())
        if "ref_logps" in rows:
            both = {f"kl_{kind}": kl(logps, rows["ref_logps"], kind, mask=mask) for kind in ("k1", "k3")}
            self._record(mask, **both)
        if old_logps is None:
            return
        kind = "gspo" if self.config.loss == "gspo" else "ppo"
        clip = self.config.clip if self.config.loss in ("ppo", "gspo") else None
        found = policy_metrics(logps, old_logps, rows["advantages"], mask, kind, clip=clip)
        self._largest.append(found.pop("ratio_max"))
        for name, mean in found.items():
            self._sums[name].append(mean.double() * mask.sum())

    def _record(self, mask: Tensor, **values: Tensor) -> None:
        for name, tensor in values.items():
            self._sums[name].append(torch.where(mask, widen(tensor.detach()), 0.0).sum(dtype=torch.float64))
