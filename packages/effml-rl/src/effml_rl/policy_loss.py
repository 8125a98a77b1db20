"""Policy-gradient losses of tokens from log-probabilities, old log-probabilities and advantages.

With rho = pi / pi_old of a token and A its advantage:

    ppo    -min(rho A, clip(rho, 1 - low, 1 + high) A)          arXiv 1707.06347; clip (0.2, 0.28) is DAPO's
    gspo   the same, rho the geometric mean over the sequence    arXiv 2507.18071
    cispo  -sg(min(rho, delta)) A log pi                         arXiv 2506.13585; sg stops the gradient
    sapo   -(4 / tau) sigmoid(tau (rho - 1)) A                   arXiv 2511.20347; tau by the sign of A

For A < 0 the first two are unbounded in rho. Two ways to bound them: `dual_clip` = c caps the loss there at -c A
(arXiv 1912.09729), and `delta` caps rho in its unclipped term (arXiv 2505.07291). With c = delta > 1 + high they are
the same function.

The mismatch weight multiplies the policy's term and not the penalty, which is added after it; both share the mask and
the normaliser. Cost: O(batch x T) elementwise, next to nothing beside a forward pass.
"""

from __future__ import annotations

import torch
from effml_shared.checks import check_choice, check_range
from effml_shared.errors import ConfigError
from effml_shared.tensors import masked_mean, widen
from torch import Tensor

from effml_rl.aggregation import aggregate
from effml_rl.importance_weights import importance_ratio
from effml_rl.token_shapes import check_tokens

__all__ = ["policy_loss", "policy_metrics"]

CLIPS = {"ppo": (0.2, 0.2), "gspo": (3e-4, 4e-4)}
REDUCTIONS = {"ppo": "token_mean", "gspo": "seq_mean_token_mean", "cispo": "token_mean", "sapo": "seq_mean_token_mean"}
CISPO_CAP = 5.0
SAPO_TEMPERATURES = (1.0, 1.05)  # for A > 0 and otherwise


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    kind: str = "ppo",
    *,
    clip: tuple[float, float] | None = None,
    delta: float | None = None,
    dual_clip: float | None = None,
    weight: Tensor | None = None,
    penalty: Tensor | None = None,
    reduction: str | None = None,
    max_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the loss as a sum and a count over this batch, see `aggregate`.

    Args:
        logps: (batch, T) of the sampled tokens, at the sampling temperature; the gradient flows into it.
        old_logps: (batch, T) before the step's first update; None in the first pass: the ratio is exactly 1.
        advantages: (batch, 1) of completions, or (batch, T) of tokens.
        mask: (batch, T) bool; tokens outside it have no influence, whatever the inputs hold there.
        kind: see the module.
        clip: (low, high) of `"ppo"` (default 0.2, 0.2) and `"gspo"` (default 3e-4, 4e-4).
        delta: cap of the ratio. `"ppo"`, `"gspo"`: more than 1 + high; None: no cap. `"cispo"`: default 5.
        dual_clip: of `"ppo"` and `"gspo"`, more than 1; None: off.
        weight: (batch, T) or (batch, 1) `mismatch_weights`; no gradient flows into it.
        penalty: (batch, T) added to each token's loss: beta KL, or minus an entropy bonus.
        reduction, max_len: see `aggregate`; default `"token_mean"`, for `"gspo"` and `"sapo"` the sequences' mean.

    Raises:
        ConfigError: an unknown kind, a shape that does not fit ((batch,) advantages above all), an option of another
            kind or out of range, or `"gspo"` with a reduction that is not a mean over each sequence.

    >>> total, count = policy_loss(torch.zeros(1, 2), None, torch.ones(1, 1), torch.ones(1, 2, dtype=torch.bool))
    >>> total.item(), count.item()
    (-2.0, 2)
    """
    check_choice("kind", kind, REDUCTIONS)
    reduction = REDUCTIONS[kind] if reduction is None else reduction
    if kind == "gspo" and reduction != REDUCTIONS[kind]:
        raise ConfigError(f"reduction: got {reduction!r} with kind 'gspo', expected {REDUCTIONS[kind]!r}")
    tokens = {"logps": logps, "old_logps": old_logps, "advantages": advantages, "weight": weight, "penalty": penalty}
    check_tokens(mask, per_row=("advantages", "weight"), **tokens)
    clip = check_clip(kind, clip, delta, dual_clip)

    old_logps = logps.detach() if old_logps is None else old_logps
    ratio = importance_ratio(logps, old_logps, mask, level="sequence" if kind == "gspo" else "token")
    advantages = torch.where(mask, widen(advantages.detach()), 0.0)
    if kind == "cispo":
        capped = ratio.detach().clamp(max=CISPO_CAP if delta is None else delta)
        losses = -capped * advantages * torch.where(mask, widen(logps), 0.0)
    elif kind == "sapo":
        positive, negative = SAPO_TEMPERATURES
        tau = torch.full_like(advantages, negative).masked_fill(advantages > 0, positive)
        losses = -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
    else:
        low, high = clip
        unclipped = ratio if delta is None else ratio.clamp(max=delta)
        losses = -torch.minimum(unclipped * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
        if dual_clip is not None:
            losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    if weight is not None:
        losses = losses * torch.where(mask, widen(weight.detach()), 0.0)
    if penalty is not None:
        losses = losses + torch.where(mask, widen(penalty), 0.0)
    return aggregate(losses, mask, reduction, max_len=max_len)


@torch.no_grad()
def policy_metrics(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    kind: str = "ppo",
    *,
    clip: tuple[float, float] | None = None,
) -> dict[str, Tensor]:
    """Return means over counted tokens that show how far a step has moved, as scalars on the inputs' device.

    `ratio` and `ratio_max`; `clip_low` and `clip_high`: the share of tokens whose gradient is cut off below (A < 0) and
    above (A > 0), with the ratio of the kind; `old_kl`: k3 of KL(pi_old || pi) on samples of pi_old.
    """
    check_choice("kind", kind, CLIPS)
    check_tokens(mask, per_row=("advantages",), advantages=advantages)
    low, high = check_clip(kind, clip, None, None)
    tokens = importance_ratio(logps, old_logps, mask)
    ratio = importance_ratio(logps, old_logps, mask, level="sequence").expand(mask.shape) if kind == "gspo" else tokens
    below, above = (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
    return {
        "ratio": masked_mean(ratio, mask),
        "ratio_max": torch.where(mask, ratio, 0.0).amax(),
        "clip_low": masked_mean(below, mask),
        "clip_high": masked_mean(above, mask),
        "old_kl": masked_mean(tokens - 1 - tokens.log(), mask),
    }


def check_clip(
    kind: str, clip: tuple[float, float] | None, delta: float | None, dual_clip: float | None
) -> tuple[float, float]:
    """Return the clip of a kind, (0, 0) where it has none; raise a `ConfigError` if an option does not fit the kind."""
    if kind not in CLIPS:
        if clip is not None or dual_clip is not None:
            raise ConfigError(f"clip, dual_clip: got one with kind {kind!r}, expected None: they are of ppo and gspo")
        if kind == "sapo" and delta is not None:
            raise ConfigError(f"delta: got {delta} with kind 'sapo', expected None: nothing is capped")
        if delta is not None and not delta > 0:
            raise ConfigError(f"delta: got {delta}, expected a number > 0")
        return 0.0, 0.0
    if clip is not None and (not isinstance(clip, tuple | list) or len(clip) != 2):
        raise ConfigError(f"clip: got {clip!r}, expected two numbers (low, high)")
    low, high = CLIPS[kind] if clip is None else clip
    check_range("clip[0]", low, 0.0, 1.0)
    check_range("clip[1]", high, 0.0, 1.0)
    if delta is not None and not delta > 1 + high:
        raise ConfigError(f"delta: got {delta}, expected a number > 1 + clip[1] = {1 + high}")
    if dual_clip is not None and not dual_clip > 1:
        raise ConfigError(f"dual_clip: got {dual_clip}, expected a number > 1")
    if delta is not None and dual_clip is not None:
        raise ConfigError("delta, dual_clip: got both, expected one: each bounds the loss at negative advantages")
    return low, high
