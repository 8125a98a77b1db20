"""Shampoo: precondition every axis of a gradient by an inverse root of its running Gram matrix.

For a matrix with averaged factors L of G G^T and R of G^T G the direction is L^(-1/4) M R^(-1/4), M the averaged
gradient; for k axes the exponent is -1/(2k). The `"trace"` variant uses -1/2 on every axis and the scale
tr(L)^((k-1)/2): for gradients of a fixed distribution it equals Adafactor in the eigenbasis of the factors, the
observation behind SOAP.

Roots are recomputed every `precondition_frequency` steps, and with them both basis and eigenvalues go stale in between.
Factors of few gradients are singular, and a stale root of a singular factor magnifies whatever it has not seen: until
the first such period has passed, a grafted Shampoo takes the step that it is grafted from, as the reference code does
by default; without grafting, it recomputes its roots at every step.

State per parameter, in float32 or wider: `step`; `exp_avg`; `exp_avg_sq` if grafted to Adam or not preconditioned;
`factor_i.b` and `root_i.b` for axis i of block b. For a matrix of one block: 8 mn + 8 (m^2 + n^2) bytes.
Cost for a matrix, a multiply-add counted as 2 FLOPs: 4 mn(m + n) per step; new roots about 11 d^3 per side of size d.

Source: Gupta et al., arXiv 1802.09568; blocks and grafting: Shi et al., arXiv 2309.06497; the trace variant:
arXiv 2409.11321, claim 1. Conventions are those of `SOAP`: averages instead of sums, vectors by plain Adam, weight
decay after the update. Unlike SOAP, the gradient of a step takes part in its own preconditioner: no call is skipped.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from effml_shared.checks import check_choice, check_count, check_range
from torch import Tensor
from torch.optim.optimizer import ParamsT

from effml_optim.matrix.adamw import adam_direction_
from effml_optim.matrix.buckets import Bucket
from effml_optim.matrix.eigenbasis import mode_product, symmetric_eigh, update_factor_
from effml_optim.matrix.optimizer import MatrixOptimizer
from effml_optim.matrix.tensor_merging import Layout, merged_shape

__all__ = ["Shampoo", "inverse_root", "shape_blocks"]


def inverse_root(factor: Tensor, exponent: float, eps: float = 1e-12) -> Tensor:
    """Return (C + eps * lambda_max * I)^(-exponent) for each factor C, (bucket, n, n).

    `eps` is relative to the largest eigenvalue, so that rescaling a loss changes nothing but the scale; eigenvalues
    that rounding made negative count as 0. The root of a zero matrix is taken to be zero: no gradient, no step.

    >>> inverse_root(torch.diag(torch.tensor([4.0, 16.0]))[None], exponent=0.5, eps=0.0)
    tensor([[[0.5000, 0.0000],
             [0.0000, 0.2500]]])
    """
    values, vectors = symmetric_eigh(factor)
    values = values.clamp_min(0.0)
    values = values + eps * values.amax(dim=-1, keepdim=True)
    powers = torch.where(values > 0, values.pow(-exponent), 0.0)
    return (vectors * powers.unsqueeze(-2)) @ vectors.mT


def shape_blocks(shape: tuple[int, ...], size: int) -> list[tuple[slice, ...]]:
    """Cut a shape into a grid of blocks of at most `size` along every axis, as index tuples in row-major order.

    >>> shape_blocks((3, 2), 2)
    [(slice(0, 2, None), slice(0, 2, None)), (slice(2, 3, None), slice(0, 2, None))]
    """
    return list(product(*([slice(i, min(i + size, n)) for i in range(0, n, size)] for n in shape)))


class Shampoo(MatrixOptimizer):
    """Train with Shampoo, by blocks, its step length grafted from Adam or SGD.

    Args:
        params: parameters, named parameters or group dicts. A group may override every option and may set
            `use_adamw=True` to run plain AdamW (see `split_params`).
        lr: learning rate, a number or a one-element tensor.
        betas: decay of the averaged gradient and of Adam's second moment.
        eps: of Adam, where it is grafted from or used instead.
        weight_decay: decoupled; applied after the update.
        shampoo_beta: decay of the factors, which are bias-corrected; None means `betas[1]`.
        matrix_eps: ridge of the inverse roots, relative to the largest eigenvalue.
        precondition_frequency: steps between two computations of the roots, after a first period of one per step.
        max_preconditioner_dim: longer axes are cut into blocks, each with its own factors.
        merge_dims: see `merged_shape`; the bound is `max_preconditioner_dim`.
        precondition_1d: give vectors a factor too, instead of plain Adam.
        exponent: `"standard"`, 1/(2k) for k axes, or `"trace"`, 1/2 and the trace scale.
        grafting: give every block the Frobenius norm of its `"adam"` or `"sgd"` direction; `"none"` keeps its own.
        correct_bias: bias correction of averages, as Adam's.
        maximize: climb instead of descend.
        foreach: False updates parameters one by one; else those of one shape are batched, on a CPU only small ones.
        precond_dtype: float32 or float64, the least precision of all state and arithmetic.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        shampoo_beta: float | None = None,
        matrix_eps: float = 1e-12,
        precondition_frequency: int = 10,
        max_preconditioner_dim: int = 1024,
        merge_dims: bool | str = False,
        precondition_1d: bool = False,
        exponent: str = "standard",
        grafting: str = "adam",
        correct_bias: bool = True,
        maximize: bool = False,
        foreach: bool | None = None,
        precond_dtype: torch.dtype | str = torch.float32,
    ) -> None:
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, {**defaults, "use_adamw": False})

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise a `ConfigError` that names the first invalid option of `group`."""
        super().check_group(group)
        if group["shampoo_beta"] is not None:
            check_range("shampoo_beta", group["shampoo_beta"], 0.0, 1.0)
        check_range("matrix_eps", group["matrix_eps"], 0.0)
        check_count("precondition_frequency", group["precondition_frequency"], 1)
        check_count("max_preconditioner_dim", group["max_preconditioner_dim"], 1)
        check_choice("merge_dims", group["merge_dims"], (False, True, "fan_in"))
        check_choice("exponent", group["exponent"], ("standard", "trace"))
        check_choice("grafting", group["grafting"], ("adam", "sgd", "none"))

    def layout(self, group: dict[str, Any], shape: torch.Size) -> Layout:
        """Return the merged shape of a parameter; all its axes carry factors, or none."""
        merged = merged_shape(shape, group["max_preconditioner_dim"], group["merge_dims"])
        plain = len(shape) == 0 or (len(shape) == 1 and not group["precondition_1d"])
        return Layout(merged, () if plain else tuple(range(len(merged))))

    def update_bucket(self, group: dict[str, Any], bucket: Bucket) -> None:
        """Make one Shampoo update of a bucket, creating its state at the first."""
        gradient = bucket.gradients(maximize=group["maximize"])
        adam = group["grafting"] == "adam" or not bucket.layout.axes
        if bucket.step is None:
            self._create_state(group, bucket, adam)
        step = bucket.advance()
        exp_avg, (beta1, beta2), corrected = bucket.stack("exp_avg"), group["betas"], group["correct_bias"]
        if adam:
            moments, eps = (exp_avg, bucket.stack("exp_avg_sq")), group["eps"]
            graft = adam_direction_(*moments, gradient, (beta1, beta2), eps, step, correct_bias=corrected)
        else:
            exp_avg.lerp_(gradient, 1 - beta1)
        momentum = exp_avg / (1 - beta1**step if corrected else 1.0)
        graft = graft if adam else momentum
        update = self._precondition(group, bucket, gradient, momentum, graft) if bucket.layout.axes else graft
        bucket.add_to_parameters(update, -group["lr"])
        if group["weight_decay"]:
            bucket.scale_parameters(1 - group["lr"] * group["weight_decay"])

    @staticmethod
    def _create_state(group: dict[str, Any], bucket: Bucket, adam: bool) -> None:
        shape = bucket.layout.shape
        bucket.start()
        bucket.zeros("exp_avg", *shape)
        if adam:
            bucket.zeros("exp_avg_sq", *shape)
        for b, block in enumerate(shape_blocks(shape, group["max_preconditioner_dim"])):
            for axis in bucket.layout.axes:
                size = block[axis].stop - block[axis].start
                bucket.zeros(f"factor_{axis}.{b}", size, size)
                bucket.zeros(f"root_{axis}.{b}", size, size)

    @staticmethod
    def _precondition(
        group: dict[str, Any], bucket: Bucket, gradient: Tensor, momentum: Tensor, graft: Tensor
    ) -> Tensor:
        """Update factors and, when due, roots; return the preconditioned momentum (bucket, *layout.shape)."""
        step, axes = bucket.step or 1, bucket.layout.axes
        beta = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
        correction = 1 - beta**step if group["correct_bias"] else 1.0
        trace = group["exponent"] == "trace"
        exponent = 0.5 if trace else 0.5 / len(axes)
        warming_up, grafted = step < group["precondition_frequency"], group["grafting"] != "none"
        due = step % group["precondition_frequency"] == 0 or (warming_up and not grafted)
        update = torch.empty_like(momentum)
        for b, block in enumerate(shape_blocks(bucket.layout.shape, group["max_preconditioner_dim"])):
            index = (slice(None), *block)
            direction = momentum[index]
            for axis in axes:
                factor, root = bucket.stack(f"factor_{axis}.{b}"), bucket.stack(f"root_{axis}.{b}")
                update_factor_(factor, gradient[index], axis, beta)
                if warming_up and grafted:
                    continue
                if due:
                    bucket.require_finite(factor)
                    corrected = factor / correction
                    root.copy_(inverse_root(corrected, exponent, group["matrix_eps"]))
                    if trace and axis > 0:  # one factor tr^(1/2) for each axis but the first; all traces are equal
                        root.mul_(corrected.diagonal(dim1=-2, dim2=-1).sum(dim=-1).sqrt()[:, None, None])
                direction = mode_product(direction, root, axis)
            if warming_up and grafted:
                direction = graft[index]
            elif grafted:
                dims = tuple(range(1, direction.ndim))
                norm = torch.linalg.vector_norm(direction, dim=dims, keepdim=True)
                wanted = torch.linalg.vector_norm(graft[index], dim=dims, keepdim=True)
                direction = torch.where(norm > 0, direction * (wanted / norm), 0.0)
            update[index] = direction
        return update
