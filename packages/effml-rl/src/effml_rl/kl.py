"""Estimators of KL(policy || reference) from one sampled token, as a value and as a term of the loss.

With d = log pi(y) - log ref(y) for y drawn from pi, and rho the ratio of pi to the policy that sampled:

    kind          per token                  as a value      gradient of its mean, at rho = 1
    k1            d                          unbiased        0: useless in a loss, right in a reward
    k2            d^2 / 2                    biased          that of KL(pi || ref)
    k3            exp(-d) - 1 + d            unbiased, >= 0  that of KL(ref || pi): the other direction
    k3+           k3, differentiated as k2   unbiased, >= 0  that of KL(pi || ref)
    k3_corrected  rho k3                     unbiased, >= 0  that of KL(pi || ref), and off policy too

An average over samples differentiates the log-probabilities and not the distribution that they were drawn from; the
right-hand column is what that leaves. Differences are held to [-20, 20] in the exponential forms.

Cost: O(tokens). Sources: http://joschu.net/blog/kl-approx.html (values); arXiv 2506.09477 (gradients).
"""

from __future__ import annotations

import torch
from effml_shared.checks import check_choice
from effml_shared.errors import ConfigError
from effml_shared.tensors import widen
from torch import Tensor

__all__ = ["kl"]

KINDS = ("k1", "k2", "k3", "k3+", "k3_corrected")


def kl(
    logps: Tensor,
    ref_logps: Tensor,
    kind: str = "k3",
    *,
    mask: Tensor | None = None,
    ratio: Tensor | None = None,
) -> Tensor:
    """Return the KL estimate of every token, (batch, T), in nats.

    Args:
        logps: (batch, T) of the policy; the gradient flows into it.
        ref_logps: (batch, T) of the reference, which gets no gradient.
        kind: see the module.
        mask: (batch, T) bool; elsewhere the estimate and its gradient are 0, whatever the inputs hold.
        ratio: (batch, T), with `"k3_corrected"` only: `importance_ratio(logps, old_logps)` of each token, with its
            gradient.

    Raises:
        ConfigError: unknown kind, shapes that differ, a ratio missing or not asked for.

    >>> kl(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.5]]), "k2").tolist()
    [[0.125, 0.125]]
    """
    check_choice("kind", kind, KINDS)
    if (ratio is None) != (kind != "k3_corrected"):
        raise ConfigError(f"ratio: got {'none' if ratio is None else 'one'} with kind {kind!r}, it is k3_corrected's")
    for name, tensor in (("ref_logps", ref_logps), ("mask", mask), ("ratio", ratio)):
        if tensor is not None and tensor.shape != logps.shape:
            raise ConfigError(f"{name}: got shape {tuple(tensor.shape)}, expected that of logps, {tuple(logps.shape)}")
    difference = widen(logps) - widen(ref_logps.detach())
    if mask is not None:  # before any exponential: 0 times the derivative of exp at NaN or infinity is NaN
        difference = torch.where(mask, difference, 0.0)
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    bounded = difference.clamp(-20.0, 20.0)
    k3 = torch.expm1(-bounded) + bounded
    if kind == "k3+":
        k2 = difference.square() / 2
        return k2 - k2.detach() + k3.detach()
    if ratio is not None:
        return (ratio if mask is None else torch.where(mask, ratio, 0.0)) * k3
    return k3
