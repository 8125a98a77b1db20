"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's preconditioner.

For a matrix W (m x n) with gradient G it averages the factors L of G G^T and R of G^T G, keeps orthonormal estimates
Q_L, Q_R of their eigenvectors, and runs Adam on the rotated gradient Q_L^T G Q_R. Second moments are renewed at every
step; only the basis is renewed every `precondition_frequency` steps, by one product and one QR per side.

State per parameter, in float32 or wider: `step`; `exp_avg` and `exp_avg_sq`, both rotated (or `row_sq` and `col_sq`);
`factor_i` and `basis_i` for every axis i that carries a factor. For a matrix: 8 mn + 8 (m^2 + n^2) bytes.
Cost for a matrix, a multiply-add counted as 2 FLOPs: 6 mn(m + n) per step; a refresh adds 2 d^3 + 8/3 d^3 per side of
size d and 4 mn(m + n) to carry the momentum over. Momentum is rotated when the basis turns, never otherwise.

Source: Vyas et al., arXiv 2409.11321, algorithms 3 and 4, and their public code for what the paper leaves open: the
first call only sets up the basis, eps is added to the root before bias correction, weight decay follows the update.
Different from that code: the closure runs with gradients enabled, options are read from the group at every step,
columns of a basis keep their places in a refresh, so that second moments need no sorting (same trajectory), and what
one gradient leaves open of the first basis is filled in alike everywhere (`eigenbasis.first_basis`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from types import EllipsisType
from typing import Any

import torch
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError
from torch import Tensor
from torch.optim.optimizer import ParamsT

from effml_optim.matrix.adamw import adam_direction_, divide
from effml_optim.matrix.buckets import Bucket
from effml_optim.matrix.eigenbasis import (
    first_basis,
    refresh_basis,
    rotate,
    staleness,
    turn_first_moment,
    turn_second_moment,
    unrotate,
    update_factor_,
)
from effml_optim.matrix.optimizer import MatrixOptimizer, state_dtype
from effml_optim.matrix.tensor_merging import Layout, merged_shape

ROWS = 4096  # of a tall matrix without a left factor that are worked on at once: a vocabulary is larger than a cache

__all__ = ["SOAP"]


class SOAP(MatrixOptimizer):
    """Train with Adam in the eigenbasis of Shampoo's preconditioner.

    The first call with a gradient only sets up that parameter's basis: it changes no weight. Sharded parameters (FSDP2)
    are updated whole by one owner each, with the same result on any number of ranks; see `sharding`.

    Args:
        params: parameters, named parameters or group dicts. A group may override every option and may set
            `use_adamw=True` to run plain AdamW (see `split_params`).
        lr: learning rate, a number or a one-element tensor.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled; applied after the update.
        shampoo_beta: decay of the factors; None means `betas[1]`.
        precondition_frequency: steps between two refreshes of a parameter's basis.
        max_precond_dim: an axis longer than this carries no factor (vocabularies).
        merge_dims: see `merged_shape`; the bound is `max_precond_dim`.
        precondition_1d: give vectors a factor too, instead of plain Adam.
        normalize_grads: scale every update to a root mean square of 1 before bias correction and lr.
        correct_bias: Adam's bias correction.
        data_format: `"channels_last"` if logical weights are (out, *spatial, in); matters only with `merge_dims`.
        one_sided: rotate matrices on their smaller side only (the left one of a square).
        factorized: keep row and column sums of the second moment of matrices (Adafactor) instead of all of it.
        basis_update: `"qr"`, `"cholqr"` (batched Cholesky QR, for GPUs) or `"eigh"`; see `refresh_basis`.
        second_moment_transport: at a refresh `"permute"` leaves second moments with their direction; `"square"` mixes
            them as if coordinates were uncorrelated.
        stagger: spread refreshes of same-shape parameters evenly over the `precondition_frequency` steps.
        refresh_tolerance: when a refresh is due, skip sides whose `staleness` is not above this; None skips none.
        precond_dtype: float32 or float64, the least precision of state and arithmetic.
        product_dtype: bfloat16 stores bases in bfloat16 and multiplies by them, and sums factors from products, in
            that precision; a refresh is in `precond_dtype` all the same. None: no such economy.
        maximize: climb instead of descend.
        foreach: False updates parameters one by one; else those of one shape are batched, on a CPU only small ones.
        capturable: not supported, since refreshes are scheduled on the host.
        eps_mode: `"reference"` adds eps to the uncorrected root; `"torch"` to the corrected one, as torch's Adam does.
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
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        merge_dims: bool | str = False,
        precondition_1d: bool = False,
        normalize_grads: bool = False,
        correct_bias: bool = True,
        data_format: str = "channels_first",
        one_sided: bool = False,
        factorized: bool = False,
        basis_update: str = "qr",
        second_moment_transport: str = "permute",
        stagger: bool = False,
        refresh_tolerance: float | None = None,
        precond_dtype: torch.dtype | str = torch.float32,
        product_dtype: torch.dtype | str | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        eps_mode: str = "reference",
    ) -> None:
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, {**defaults, "use_adamw": False})

    @classmethod
    def lean(cls, params: ParamsT, **options: Any) -> SOAP:
        """Return a SOAP for little memory: one-sided, factorized, products and bases in bfloat16.

        A matrix m x n with m <= n takes 4 mn + 6 m^2 bytes against AdamW's 8 mn: more for a square, less from n = 1.5 m
        on, and less in all for a Transformer (`memory_report` tells).

        >>> report = SOAP.lean(torch.nn.Linear(256, 64, bias=False).parameters()).memory_report()
        >>> report["total"], report["adamw"]
        (91392, 131072)
        """
        return cls(params, **{"one_sided": True, "factorized": True, "product_dtype": torch.bfloat16, **options})

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise a `ConfigError` that names the first invalid option of `group`."""
        super().check_group(group)
        if group["shampoo_beta"] is not None:
            check_range("shampoo_beta", group["shampoo_beta"], 0.0, 1.0)
        if group["refresh_tolerance"] is not None:
            check_range("refresh_tolerance", group["refresh_tolerance"], 0.0)
        check_count("precondition_frequency", group["precondition_frequency"], 1)
        check_count("max_precond_dim", group["max_precond_dim"], 0)
        check_choice("merge_dims", group["merge_dims"], (False, True, "fan_in"))
        check_choice("data_format", group["data_format"], ("channels_first", "channels_last"))
        check_choice("basis_update", group["basis_update"], ("qr", "eigh", "cholqr"))
        check_choice("second_moment_transport", group["second_moment_transport"], ("permute", "square"))
        if group["product_dtype"] is not None:  # kept as a string: safe in any checkpoint
            group["product_dtype"] = str(group["product_dtype"]).removeprefix("torch.")
            check_choice("product_dtype", group["product_dtype"], ("bfloat16",))
        check_choice("eps_mode", group["eps_mode"], ("reference", "torch"))
        if group["capturable"]:
            raise ConfigError("capturable: got True, expected False: refreshes are scheduled on the host")
        if group["merge_dims"] is True and not group["use_adamw"]:
            self._warn_of_flattened_matrices(group)

    def _warn_of_flattened_matrices(self, group: dict[str, Any]) -> None:
        for param in group["params"]:
            if param.ndim > 1 and len(merged := self.layout(group, param.shape).shape) == 1:
                message = f"merge_dims=True flattens shape {tuple(param.shape)} to {merged}: prefer 'fan_in'"
                warnings.warn(message, UserWarning, stacklevel=4)
                return

    def layout(self, group: dict[str, Any], shape: torch.Size) -> Layout:
        """Return the merged shape of a parameter and which of its axes carry a factor."""
        options = ("max_precond_dim", "merge_dims", "precondition_1d", "data_format", "one_sided")
        return _layout(tuple(shape), *(group[name] for name in options))

    def phases(self, group: dict[str, Any], layouts: list[Layout]) -> Sequence[int]:
        """Spread refreshes over the period so that every step has about the same work, if `stagger` is on."""
        if not group["stagger"]:
            return super().phases(group, layouts)
        return _balanced_phases(tuple(layouts), group["precondition_frequency"])

    def update_bucket(self, group: dict[str, Any], bucket: Bucket) -> None:
        """Make one SOAP update of a bucket, or set up its state."""
        gradient = bucket.gradients(maximize=group["maximize"])
        if bucket.step is None:
            self._initialise(group, bucket, gradient)
            return
        step, axes = bucket.advance(), bucket.layout.axes
        bases = {axis: bucket.stack(f"basis_{axis}") for axis in axes}
        by_rows = axes == (1,) and not group["normalize_grads"] and not _is_factorized(group, bucket.layout)
        for number, block in enumerate(bucket.row_blocks(ROWS) if by_rows else [...]):
            part = gradient[:, block]
            seen = part.to(bases[axes[0]].dtype) if axes else part  # what products are made of
            update = self._direction(group, bucket, rotate(seen, bases).to(part.dtype), step, block)
            update = unrotate(update, bases)
            if group["normalize_grads"]:
                dims = tuple(range(1, update.ndim))
                root_mean_square = update.square().mean(dim=dims, keepdim=True).sqrt()
                update = update / (1e-30 + root_mean_square) * _step_correction(group, step)
            bucket.add_to_parameters(update, -group["lr"], block)
            beta = _shampoo_beta(group)
            for axis in axes:  # last: a gradient never chooses the basis it is seen in
                update_factor_(bucket.stack(f"factor_{axis}"), seen, axis, 1.0 if number else beta, 1 - beta)
        if group["weight_decay"]:
            bucket.scale_parameters(1 - group["lr"] * group["weight_decay"])
        period = group["precondition_frequency"]
        if axes and (due := [row for row, m in enumerate(bucket.members) if (step + m.phase) % period == 0]):
            self._refresh(group, bucket, due, group["refresh_tolerance"])

    @staticmethod
    def _initialise(group: dict[str, Any], bucket: Bucket, gradient: Tensor) -> None:
        shape, size = bucket.layout.shape, len(bucket.members)
        empty = {axis: gradient.new_zeros(size, shape[axis], shape[axis]) for axis in bucket.layout.axes}
        factors = {axis: update_factor_(factor, gradient, axis, _shampoo_beta(group)) for axis, factor in empty.items()}
        for factor in factors.values():  # before any state exists
            bucket.require_finite(factor)
        bucket.start()
        bucket.zeros("exp_avg", *shape)
        if _is_factorized(group, bucket.layout):
            bucket.zeros("row_sq", shape[0])
            bucket.zeros("col_sq", shape[1])
        else:
            bucket.zeros("exp_avg_sq", *shape)
        for axis, factor in factors.items():
            bucket.create(f"factor_{axis}", factor)
            bucket.create(f"basis_{axis}", first_basis(gradient, axis).to(_basis_dtype(group, factor.dtype)))

    @staticmethod
    def _direction(
        group: dict[str, Any], bucket: Bucket, rotated: Tensor, step: int, block: slice | EllipsisType
    ) -> Tensor:
        """Update the moments of a block of rows from the rotated gradient; return Adam's direction there."""
        betas, corrected = group["betas"], group["correct_bias"]
        root_correction = (1 - betas[1] ** step) ** 0.5 if corrected else 1.0
        # Adam adds eps to the corrected root, where the reference adds it to the uncorrected one.
        eps = group["eps"] / (root_correction if group["eps_mode"] == "reference" else 1.0)
        exp_avg = bucket.stack("exp_avg")[:, block]
        if not _is_factorized(group, bucket.layout):
            moments = exp_avg, bucket.stack("exp_avg_sq")[:, block]
            return adam_direction_(*moments, rotated, betas, eps, step, correct_bias=corrected)
        square, rate = rotated.square(), 1 - betas[1]
        rows = bucket.stack("row_sq").lerp_(square.sum(dim=2), rate)
        cols = bucket.stack("col_sq").lerp_(square.sum(dim=1), rate)
        total = rows.sum(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)  # all sums are 0 where it matters
        root = torch.mul((rows / total).sqrt().unsqueeze(2), cols.sqrt().div_(root_correction).unsqueeze(1)).add_(eps)
        exp_avg.lerp_(rotated, 1 - betas[0])
        return divide(exp_avg, root, eps).div_(1 - betas[0] ** step if corrected else 1.0)

    def _refresh(self, group: dict[str, Any], bucket: Bucket, due: list[int], tolerance: float | None) -> None:
        """Bring the bases of the members `due` up to date, and the moments with them."""
        factors = {axis: bucket.stack(f"factor_{axis}") for axis in bucket.layout.axes}
        for factor in factors.values():
            bucket.require_finite(factor, due)
        square = group["second_moment_transport"] == "square"
        for axis, factor in factors.items():
            bases, rows = bucket.stack(f"basis_{axis}"), due
            if tolerance is not None:
                index = _index(rows, bases)
                stale = (staleness(factor[index], bases[index].to(factor.dtype)) > tolerance).tolist()
                rows = [row for row, is_stale in zip(rows, stale, strict=True) if is_stale]
            if not rows:
                continue
            index = _index(rows, bases)
            old = bases[index].to(factor.dtype)
            new = refresh_basis(factor[index], old, group["basis_update"])
            exp_avg = bucket.stack("exp_avg")
            exp_avg[index] = turn_first_moment(exp_avg[index], old, new, axis)
            if square and _is_factorized(group, bucket.layout):
                sums = bucket.stack("row_sq" if axis == 0 else "col_sq")
                sums[index] = turn_second_moment(sums[index], old, new, 0)
            elif square:
                exp_avg_sq = bucket.stack("exp_avg_sq")
                exp_avg_sq[index] = turn_second_moment(exp_avg_sq[index], old, new, axis)
            bases[index] = new

    @torch.no_grad()
    def refresh_now(self) -> None:
        """Refresh every basis at once, whatever its schedule and staleness."""
        for group, bucket in self.buckets():
            if not group["use_adamw"] and bucket.layout.axes:
                with torch.autocast(bucket.device.type, enabled=False):
                    self._refresh(group, bucket, list(range(len(bucket.members))), None)
                bucket.close()

    @torch.no_grad()
    def basis_staleness(self) -> dict[str, dict[int, float]]:
        """Return per parameter name and axis how far its basis is from diagonalising its factor; see `staleness`."""
        report: dict[str, dict[int, float]] = {}
        for group, bucket in self.buckets():
            for axis in () if group["use_adamw"] else bucket.layout.axes:
                with torch.autocast(bucket.device.type, enabled=False):
                    factor, basis = bucket.stack(f"factor_{axis}"), bucket.stack(f"basis_{axis}")
                    values = staleness(factor, basis.to(factor.dtype)).tolist()
                for member, value in zip(bucket.members, values, strict=True):
                    report.setdefault(member.name, {})[axis] = value
        return self.union(report)

    def memory_report(self) -> dict[str, int]:
        """Return the bytes of state after the first step, of all parameters, before anything is allocated.

        Works for parameters on the meta device. `adamw` is what AdamW with state of the same dtype would take.

        >>> SOAP(torch.nn.Linear(256, 64, bias=False).parameters(), one_sided=True).memory_report()
        {'moments': 131072, 'factors': 16384, 'bases': 16384, 'total': 163840, 'adamw': 131072}
        """
        report = dict.fromkeys(("moments", "factors", "bases", "total", "adamw"), 0)
        for group in self.param_groups:
            for param in group["params"]:
                dtype = state_dtype(group, param)
                layout = Layout(tuple(param.shape)) if group["use_adamw"] else self.layout(group, param.shape)
                thin = not group["use_adamw"] and _is_factorized(group, layout)
                squares = sum(layout.shape[axis] ** 2 for axis in layout.axes)
                report["moments"] += dtype.itemsize * (param.numel() + (sum(layout.shape) if thin else param.numel()))
                report["factors"] += dtype.itemsize * squares
                report["bases"] += _basis_dtype(group, dtype).itemsize * squares
                report["adamw"] += dtype.itemsize * 2 * param.numel()
        return {**report, "total": report["moments"] + report["factors"] + report["bases"]}


@lru_cache(maxsize=4096)
def _layout(
    shape: tuple[int, ...],
    max_precond_dim: int,
    merge_dims: bool | str,
    precondition_1d: bool,
    data_format: str,
    one_sided: bool,
) -> Layout:
    channels_last = data_format == "channels_last" and len(shape) > 2
    logical = (shape[0], shape[-1], *shape[1:-1]) if channels_last else shape
    merged = merged_shape(logical, max_precond_dim, merge_dims)
    if len(shape) == 0 or (len(shape) == 1 and not precondition_1d):
        return Layout(merged, (), channels_last)
    candidates: Iterable[int] = range(len(merged))
    if one_sided and len(merged) == 2:
        candidates = (0,) if merged[0] <= merged[1] else (1,)
    # An axis of length 1 has the basis (1) or (-1): turning by it changes nothing.
    return Layout(merged, tuple(axis for axis in candidates if 1 < merged[axis] <= max_precond_dim), channels_last)


@lru_cache(maxsize=256)
def _balanced_phases(layouts: tuple[Layout, ...], period: int) -> tuple[int, ...]:
    """Deal equal layouts out evenly; what is over goes, dearest first, where the least work is."""
    phases, load = [0] * len(layouts), [0.0] * period
    members: dict[Layout, list[int]] = {}
    for position, layout in enumerate(layouts):
        members.setdefault(layout, []).append(position)
    for layout in sorted(members, key=_refresh_flops, reverse=True):
        positions = members[layout]
        for start in range(0, len(positions), period):
            some = positions[start : start + period]
            freest = sorted(range(period), key=load.__getitem__)[: len(some)]
            for position, phase in zip(some, freest, strict=True):
                phases[position] = phase
                load[phase] += _refresh_flops(layout)
    return tuple(phases)


def _refresh_flops(layout: Layout) -> float:
    """Product, QR and the turning of the momentum, per axis that carries a factor."""
    sizes = [layout.shape[axis] for axis in layout.axes]
    return sum(14 / 3 * n**3 + 4 * n * math.prod(layout.shape) for n in sizes)


def _is_factorized(group: dict[str, Any], layout: Layout) -> bool:
    return group["factorized"] and len(layout.shape) == 2


def _basis_dtype(group: dict[str, Any], dtype: torch.dtype) -> torch.dtype:
    return dtype if group["product_dtype"] is None else torch.bfloat16


def _step_correction(group: dict[str, Any], step: int) -> float:
    beta1, beta2 = group["betas"]
    return (1 - beta2**step) ** 0.5 / (1 - beta1**step) if group["correct_bias"] else 1.0


def _shampoo_beta(group: dict[str, Any]) -> float:
    return group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]


def _index(rows: list[int], stack: Tensor) -> slice | Tensor:
    """Index these rows of a stack, all of them as a view."""
    return slice(None) if len(rows) == len(stack) else torch.tensor(rows, device=stack.device)
