"""Muon: momentum, orthogonalised by a Newton-Schulz iteration.

The update direction of a matrix is (nearly) U V^T of its momentum U S V^T: every singular value is moved close to 1 by
five steps of an odd quintic polynomial, in bfloat16. A tensor of more than two axes is seen as (out, all the rest).

State per matrix: `momentum_buffer`, 4 bytes per element in float32 whatever the parameter's dtype (`torch.optim.Muon`
keeps the gradient's). Cost per step, with s the smaller and l the larger side, a multiply-add counted as 2 FLOPs:
5 (4 s^2 l + 2 s^3) FLOPs in bfloat16.

Source: K. Jordan et al., https://kellerjordan.github.io/posts/muon/; the `"match_rms_adamw"` scale: arXiv 2502.16982.

Why not `torch.optim.Muon`: for matrices this is that optimizer, bit for bit in float32, but it takes any number of
axes, batches matrices of one shape, and trains embeddings, heads, norms and biases by AdamW in the same optimizer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError
from torch import Tensor
from torch.optim.optimizer import ParamsT

from effml_optim.matrix.buckets import Bucket
from effml_optim.matrix.optimizer import MatrixOptimizer
from effml_optim.matrix.tensor_merging import Layout

__all__ = ["Muon", "newton_schulz"]


def newton_schulz(
    x: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Move all singular values of each matrix near 1: x is (bucket, m, n), and so is the result, in `dtype`.

    The polynomial trades accuracy for speed: results lie between about 0.7 and 1.2 unless they started near 0.

    >>> newton_schulz(torch.diag(torch.tensor([3.0, 2.0]))[None]).shape
    torch.Size([1, 2, 2])
    """
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    y = x.to(dtype, copy=True)
    y = y.mT if tall else y  # the Gram matrix of the smaller side
    y.div_(y.norm(dim=(-2, -1), keepdim=True).clamp(min=eps))
    for _ in range(steps):
        gram = torch.bmm(y, y.mT)
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


class Muon(MatrixOptimizer):
    """Train matrices along their orthogonalised momentum, and groups with `use_adamw=True` by AdamW.

    Args:
        params: parameters of at least two axes, or group dicts. Not every matrix belongs here: embeddings and output
            heads want AdamW, and a stack of experts (experts, in, out) is not one matrix. See `split_params`.
        lr: learning rate, a number or a one-element tensor.
        weight_decay: decoupled; applied before the update.
        momentum: decay of the momentum.
        nesterov: look ahead by one step of momentum.
        ns_coefficients: of x, x^3 and x^5 in the iteration.
        ns_eps: least Frobenius norm to divide by.
        ns_steps: number of iterations.
        adjust_lr: `"original"` scales lr by sqrt(max(1, rows / columns)); `"match_rms_adamw"` by
            0.2 sqrt(max(rows, columns)), so that an lr tuned for AdamW can be kept.
        betas: decay of the moments in AdamW groups.
        eps: eps of AdamW groups.
        maximize: climb instead of descend.
        foreach: False updates parameters one by one; else those of one shape are batched, on a CPU only small ones.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        ns_eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr: str = "original",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        maximize: bool = False,
        foreach: bool | None = None,
    ) -> None:
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, {**defaults, "use_adamw": False})

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise a `ConfigError` that names the first invalid option of `group`, or a vector among its matrices."""
        super().check_group(group)
        check_range("momentum", group["momentum"], 0.0, 1.0)
        check_range("ns_eps", group["ns_eps"], 0.0)
        check_count("ns_steps", group["ns_steps"], 1)
        if len(group["ns_coefficients"]) != 3:
            raise ConfigError(f"ns_coefficients: got {len(group['ns_coefficients'])} numbers, expected 3")
        check_choice("adjust_lr", group["adjust_lr"], ("original", "match_rms_adamw"))
        vector = next((tuple(p.shape) for p in group["params"] if p.ndim < 2), None)
        if vector is not None and not group["use_adamw"]:
            raise ConfigError(
                f"params: got one of shape {vector}, expected matrices: put it in a group with use_adamw=True"
            )

    def layout(self, group: dict[str, Any], shape: torch.Size) -> Layout:
        """Return the matrix (out, all the rest)."""
        return Layout((shape[0], math.prod(shape[1:])))

    def update_bucket(self, group: dict[str, Any], bucket: Bucket) -> None:
        """Make one Muon update of a bucket of matrices."""
        gradient = bucket.gradients(maximize=group["maximize"])
        if bucket.step is None:
            bucket.start()
            bucket.zeros("momentum_buffer", *bucket.layout.shape)
        bucket.advance()
        momentum, lr, (rows, columns) = group["momentum"], group["lr"], bucket.layout.shape
        buffer = bucket.stack("momentum_buffer").lerp_(gradient, 1 - momentum)
        look_ahead = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
        update = newton_schulz(look_ahead, group["ns_steps"], group["ns_coefficients"], group["ns_eps"])
        original = group["adjust_lr"] == "original"
        ratio = math.sqrt(max(1, rows / columns)) if original else 0.2 * math.sqrt(max(rows, columns))
        bucket.scale_parameters(1 - lr * group["weight_decay"])
        bucket.add_to_parameters(update, -lr * ratio)
