"""Ratios of the probabilities that two policies give to sampled tokens, and weights made of them.

Two different quantities share the formula exp(log p - log q). The *importance ratio* of the policy to the one at the
start of the step is differentiated: policy losses are made of it. The *mismatch weight* of the trainer to the sampler
repairs that an inference engine computes other probabilities than the trainer for the same weights; it is a constant.

    truncate  min(w, cap)                 bounded variance, some bias ("TIS")
    mask      w where floor <= w <= cap, else 0  ("MIS")

A sequence's weight is the product over its tokens, not their mean. If the sampler drew from a truncated distribution
(top-k, top-p, min-p), its log-probabilities are those after renormalisation: every weight is then too small by the
mass that was kept, unless the trainer renormalises over the same tokens or the untruncated log-probability is stored.

Cost: O(tokens).
"""

from __future__ import annotations

import torch
from effml_shared.checks import check_choice, check_range
from effml_shared.errors import ConfigError
from effml_shared.tensors import masked_mean, widen
from torch import Tensor

from effml_rl.token_shapes import check_tokens

__all__ = ["effective_sample_size", "importance_ratio", "mismatch_weights"]

LIMIT = 20.0  # of a logarithm before exp: e^20 is far beyond any clip, and its products stay finite in float32


def importance_ratio(logps: Tensor, old_logps: Tensor, mask: Tensor, *, level: str = "token") -> Tensor:
    """Return pi / pi_old, differentiable in logps: (batch, T) of tokens, or (batch, 1) of sequences.

    Args:
        logps, old_logps: (batch, T); old_logps get no gradient.
        mask: (batch, T) bool; the ratio is 1 elsewhere, without a gradient, whatever the inputs hold.
        level: `"token"`, or `"sequence"`: the geometric mean over the counted tokens (GSPO, arXiv 2507.18071).
    """
    check_choice("level", level, ("token", "sequence"))
    check_tokens(mask, logps=logps, old_logps=old_logps)
    difference = torch.where(mask, widen(logps) - widen(old_logps.detach()), 0.0)
    if level == "sequence":
        difference = masked_mean(difference, mask, dim=1).unsqueeze(1)
    return difference.clamp(-LIMIT, LIMIT).exp()


def mismatch_weights(
    logps: Tensor,
    sampler_logps: Tensor,
    mask: Tensor,
    *,
    kind: str = "truncate",
    level: str = "token",
    cap: float = 2.0,
    floor: float = 0.0,
) -> Tensor:
    """Return the constant weights trainer / sampler: (batch, T) of tokens, or (batch, 1) of sequences.

    Args:
        logps: (batch, T) by the trainer, of the weights that sampled; sampler_logps: (batch, T) by the sampler.
        mask: (batch, T) bool; a token outside it has the weight 1.
        kind: `"truncate"` or `"mask"`, see the module.
        level: `"token"`, or `"sequence"`: the product over the counted tokens.
        cap: the largest weight, usually 2 to 3.
        floor: with `"mask"`, the smallest.
    """
    check_choice("kind", kind, ("truncate", "mask"))
    check_choice("level", level, ("token", "sequence"))
    check_range("floor", floor, 0.0, cap)
    if floor and kind != "mask":
        raise ConfigError(f"floor: got {floor} with kind {kind!r}, expected 0: it is used by 'mask'")
    check_tokens(mask, logps=logps, sampler_logps=sampler_logps)
    difference = torch.where(mask, widen(logps.detach()) - widen(sampler_logps.detach()), 0.0)
    if level == "sequence":
        difference = difference.sum(1, keepdim=True)
    weights = difference.clamp(-LIMIT, LIMIT).exp()
    if kind == "truncate":
        return weights.clamp(max=cap)
    return torch.where((floor <= weights) & (weights <= cap), weights, 0.0)


def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    """Return (sum w)^2 / sum w^2 over the counted weights: how many equally weighted samples are worth as much.

    >>> effective_sample_size(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([True, True, True])).item()
    2.0
    """
    if weights.shape != mask.shape:
        raise ConfigError(f"weights: got shape {tuple(weights.shape)}, expected that of mask, {tuple(mask.shape)}")
    counted = torch.where(mask, widen(weights), 0.0)
    squares = counted.square().sum()
    return counted.sum().square() / squares.clamp(min=torch.finfo(squares.dtype).tiny)
