"""AdamW on a bucket: the one rule for parameters that no matrix optimizer should touch.

Embeddings, output heads, norms and biases are updated elementwise, inside the same optimizer, so that a model keeps one
optimizer, one scheduler and one state_dict. State: `exp_avg` and `exp_avg_sq`, 8 bytes per element in float32, whatever
the parameter's dtype. Cost: no products, about 12 FLOPs and 28 bytes per element, in one pass by torch's fused kernel.

Source: Loshchilov and Hutter, arXiv 1711.05101, in the conventions of `torch.optim.AdamW`: decay first, eps added to
the bias-corrected root.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from effml_optim.matrix.buckets import Bucket
from effml_optim.matrix.sharding import local_tensor

__all__ = ["adam_direction_", "adamw_update", "divide"]

FUSED = ("cpu", "cuda")  # devices for which torch has a fused kernel


def adam_direction_(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    gradient: Tensor,
    betas: tuple[float, float],
    eps: float,
    step: int,
    *,
    correct_bias: bool = True,
) -> Tensor:
    """Update both moments in place; return the mean over (the root mean square plus `eps`), 0 where both are 0.

    Args:
        exp_avg, exp_avg_sq: moments, changed in place.
        gradient: of the same shape and dtype.
        step: number of this update, 1 for the first, by which bias is corrected.

    >>> mean, square = torch.zeros(2), torch.zeros(2)
    >>> adam_direction_(mean, square, torch.tensor([0.5, 0.0]), (0.8, 0.75), eps=0.0, step=1)
    tensor([1., 0.])
    """
    if eps > 0 and gradient.device.type in FUSED:
        direction = torch.zeros_like(gradient)
        never = 1 << 30  # a step so late that the correction is 1
        _fused([direction], [gradient], [exp_avg], [exp_avg_sq], betas, eps, step if correct_bias else never, lr=-1.0)
        return direction
    exp_avg.lerp_(gradient, 1 - betas[0])
    root = exp_avg_sq.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1]).sqrt()
    if not correct_bias:
        return divide(exp_avg, root.add_(eps), eps)
    return divide(exp_avg, root.div_((1 - betas[1] ** step) ** 0.5).add_(eps), eps).div_(1 - betas[0] ** step)


def divide(numerator: Tensor, root: Tensor, eps: float) -> Tensor:
    """Return `numerator / root`, and 0 where the root is 0, which only `eps` = 0 allows."""
    quotient = numerator / root
    return quotient if eps > 0 else quotient.masked_fill_(root == 0, 0.0)


def adamw_update(group: dict[str, Any], bucket: Bucket) -> None:
    """Make one AdamW update of a bucket, reading lr, betas, eps, weight_decay and maximize from its param group."""
    if bucket.step is None:
        bucket.start()
        bucket.zeros("exp_avg", *bucket.layout.shape)
        bucket.zeros("exp_avg_sq", *bucket.layout.shape)
    step, betas, eps, lr = bucket.advance(), group["betas"], group["eps"], group["lr"]
    params = [local_tensor(member.param) for member in bucket.members]
    gradients = [member.grad for member in bucket.members if member.grad is not None]
    if eps > 0 and bucket.device.type in FUSED and all(x.dtype == bucket.dtype for x in (*params, *gradients)):
        means, squares = ([member.state[key] for member in bucket.members] for key in ("exp_avg", "exp_avg_sq"))
        options = {name: group[name] for name in ("lr", "weight_decay", "maximize")}
        _fused(params, gradients, means, squares, betas, eps, step, **options)
        return
    if group["weight_decay"]:
        bucket.scale_parameters(1 - lr * group["weight_decay"])
    gradient = bucket.gradients(maximize=group["maximize"])
    direction = adam_direction_(bucket.stack("exp_avg"), bucket.stack("exp_avg_sq"), gradient, betas, eps, step)
    bucket.add_to_parameters(direction, -lr)


def _fused(
    params: list[Tensor],
    gradients: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    betas: tuple[float, float],
    eps: float,
    step: int,
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> None:
    """Run torch's fused AdamW kernel: everything in one pass over memory."""
    before = torch.full((len(params),), float(step - 1), device=params[0].device).unbind()  # it counts them up itself
    adamw(
        params,
        gradients,
        means,
        squares,
        [],
        list(before),
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=maximize,
    )
