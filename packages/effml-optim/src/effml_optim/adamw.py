"""AdamW on a bucket: the one rule for parameters that no matrix optimizer should touch.

Embeddings, output heads, norms and biases are updated elementwise, inside the same optimizer, so that a model keeps one
optimizer, one scheduler and one state_dict. State: `exp_avg` and `exp_avg_sq`, 8 bytes per element in float32, whatever
the parameter's dtype. Cost: no products, about 12 FLOPs and 28 bytes per element.

Source: Loshchilov and Hutter, arXiv 1711.05101, in the conventions of `torch.optim.AdamW`: decay first, eps added to
the bias-corrected root.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from effml_optim.buckets import Bucket

__all__ = ["adam_direction", "adamw_update", "divide"]


def adam_direction(exp_avg: Tensor, exp_avg_sq: Tensor, betas: tuple[float, float], eps: float, step: int) -> Tensor:
    """Return the bias-corrected mean over the bias-corrected root mean square plus `eps`; 0 where both are 0.

    >>> import torch
    >>> adam_direction(torch.tensor([0.2, 0.0]), torch.tensor([0.25, 0.0]), (0.8, 0.75), eps=0.0, step=1)
    tensor([1., 0.])
    """
    root = exp_avg_sq.sqrt().div_((1 - betas[1] ** step) ** 0.5).add_(eps)
    return divide(exp_avg, root, eps).div_(1 - betas[0] ** step)


def divide(numerator: Tensor, root: Tensor, eps: float) -> Tensor:
    """Return `numerator / root`, and 0 where the root is 0, which only `eps` = 0 allows."""
    quotient = numerator / root
    return quotient if eps > 0 else quotient.masked_fill_(root == 0, 0.0)


def adamw_update(group: dict[str, Any], bucket: Bucket) -> None:
    """Make one AdamW update of a bucket, reading lr, betas, eps, weight_decay and maximize from its param group."""
    gradient = bucket.gradients(maximize=group["maximize"])
    if bucket.step is None:
        bucket.start()
        bucket.zeros("exp_avg", *bucket.layout.shape)
        bucket.zeros("exp_avg_sq", *bucket.layout.shape)
    step, lr, (beta1, beta2) = bucket.advance(), group["lr"], group["betas"]
    exp_avg = bucket.stack("exp_avg").lerp_(gradient, 1 - beta1)
    exp_avg_sq = bucket.stack("exp_avg_sq").mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if group["weight_decay"]:
        bucket.scale_parameters(1 - lr * group["weight_decay"])
    bucket.add_to_parameters(adam_direction(exp_avg, exp_avg_sq, (beta1, beta2), group["eps"], step), -lr)
