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
Different from that code: the closure runs with gradients enabled, options are read from the group at every step, and
columns of a basis keep their places in a refresh, so that second moments need no sorting (same trajectory).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from effml_shared.errors import ConfigError
from torch import Tensor
from torch.optim.optimizer import ParamsT

from effml_optim.adamw import divide
from effml_optim.buckets import Bucket
from effml_optim.eigenbasis import (
    eigenvectors,
    refresh_basis,
    rotate,
    staleness,
    turn_first_moment,
    turn_second_moment,
    unrotate,
    update_factor_,
)
from effml_optim.matrix_optimizer import MatrixOptimizer, check_choice, check_count, check_range, state_dtype
from effml_optim.tensor_merging import Layout, merged_shape

__all__ = ["SOAP"]


class SOAP(MatrixOptimizer):
    """Train with Adam in the eigenbasis of Shampoo's preconditioner.

    The first call with a gradient only sets up that parameter's basis: it changes no weight. Where one gradient leaves
    eigenvectors undetermined (a rectangular matrix has a null space of |m - n| dimensions), the first basis, and with
    it the early trajectory, depends on the LAPACK or cuSOLVER build.

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
        precond_dtype: float32 or float64, the least precision of all state and arithmetic.
        maximize: climb instead of descend.
        foreach: False updates parameters one by one; otherwise those of one shape are batched.
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
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        eps_mode: str = "reference",
    ) -> None:
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, {**defaults, "use_adamw": False})

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

    def update_bucket(self, group: dict[str, Any], bucket: Bucket) -> None:
        """Make one SOAP update of a bucket, or set up its state."""
        gradient = bucket.gradients(maximize=group["maximize"])
        if bucket.step is None:
            self._initialise(group, bucket, gradient)
            return
        step, axes, (beta1, beta2) = bucket.advance(), bucket.layout.axes, group["betas"]
        bases = {axis: bucket.stack(f"basis_{axis}") for axis in axes}
        rotated = rotate(gradient, bases)
        exp_avg = bucket.stack("exp_avg").lerp_(rotated, 1 - beta1)
        root = self._update_second_moment(group, bucket, rotated).sqrt()
        root_correction = (1 - beta2**step) ** 0.5 if group["correct_bias"] else 1.0
        eps = group["eps"] * (root_correction if group["eps_mode"] == "torch" else 1.0)
        update = unrotate(divide(exp_avg, root.add_(eps), eps), bases)
        if group["normalize_grads"]:
            dims = tuple(range(1, update.ndim))
            update = update / (1e-30 + update.square().mean(dim=dims, keepdim=True).sqrt())
        step_size = group["lr"] * (root_correction / (1 - beta1**step) if group["correct_bias"] else 1.0)
        bucket.add_to_parameters(update, -step_size)
        if group["weight_decay"]:
            bucket.scale_parameters(1 - group["lr"] * group["weight_decay"])
        for axis in axes:  # last: a gradient never chooses the basis it is seen in
            update_factor_(bucket.stack(f"factor_{axis}"), gradient, axis, _shampoo_beta(group))
        period = group["precondition_frequency"]
        phases = [member.phase if group["stagger"] else 0 for member in bucket.members]
        if axes and (due := [row for row, phase in enumerate(phases) if (step + phase) % period == 0]):
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
            bucket.create(f"basis_{axis}", eigenvectors(factor))

    @staticmethod
    def _update_second_moment(group: dict[str, Any], bucket: Bucket, rotated: Tensor) -> Tensor:
        """Average the squared gradient into the second moment and return that, (bucket, *layout.shape)."""
        beta = group["betas"][1]
        if not _is_factorized(group, bucket.layout):
            return bucket.stack("exp_avg_sq").mul_(beta).addcmul_(rotated, rotated, value=1 - beta)
        square = rotated.square()
        rows = bucket.stack("row_sq").lerp_(square.sum(dim=2), 1 - beta)
        cols = bucket.stack("col_sq").lerp_(square.sum(dim=1), 1 - beta)
        total = rows.sum(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)  # all sums are 0 where it matters
        return (rows / total).unsqueeze(2) * cols.unsqueeze(1)

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
                stale = (staleness(factor[index], bases[index]) > tolerance).tolist()
                rows = [row for row, is_stale in zip(rows, stale, strict=True) if is_stale]
            if not rows:
                continue
            index = _index(rows, bases)
            old = bases[index]
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
        for group, bucket in self.buckets(with_gradient=False):
            if not group["use_adamw"] and bucket.layout.axes:
                with torch.autocast(bucket.device.type, enabled=False):
                    self._refresh(group, bucket, list(range(len(bucket.members))), None)
                bucket.close()

    @torch.no_grad()
    def basis_staleness(self) -> dict[str, dict[int, float]]:
        """Return per parameter name and axis how far its basis is from diagonalising its factor; see `staleness`."""
        report: dict[str, dict[int, float]] = {}
        for group, bucket in self.buckets(with_gradient=False):
            for axis in () if group["use_adamw"] else bucket.layout.axes:
                with torch.autocast(bucket.device.type, enabled=False):
                    values = staleness(bucket.stack(f"factor_{axis}"), bucket.stack(f"basis_{axis}")).tolist()
                for member, value in zip(bucket.members, values, strict=True):
                    report.setdefault(member.name, {})[axis] = value
        return report

    def memory_report(self) -> dict[str, int]:
        """Return the bytes of state after the first step, of all parameters, before anything is allocated.

        Works for parameters on the meta device. `adamw` is what AdamW with state of the same dtype would take.

        >>> SOAP(torch.nn.Linear(256, 64, bias=False).parameters(), one_sided=True).memory_report()
        {'moments': 131072, 'factors': 16384, 'bases': 16384, 'total': 163840, 'adamw': 131072}
        """
        moments = factors = adamw = 0
        for group in self.param_groups:
            for param in group["params"]:
                size = state_dtype(group, param).itemsize
                layout = Layout(tuple(param.shape)) if group["use_adamw"] else self.layout(group, param.shape)
                thin = not group["use_adamw"] and _is_factorized(group, layout)
                moments += size * (param.numel() + (sum(layout.shape) if thin else param.numel()))
                factors += size * sum(layout.shape[axis] ** 2 for axis in layout.axes)
                adamw += size * 2 * param.numel()
        return {
            "moments": moments,
            "factors": factors,
            "bases": factors,
            "total": moments + 2 * factors,
            "adamw": adamw,
        }


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


def _is_factorized(group: dict[str, Any], layout: Layout) -> bool:
    return group["factorized"] and len(layout.shape) == 2


def _shampoo_beta(group: dict[str, Any]) -> float:
    return group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]


def _index(rows: list[int], stack: Tensor) -> slice | Tensor:
    """Index these rows of a stack, all of them as a view."""
    return slice(None) if len(rows) == len(stack) else torch.tensor(rows, device=stack.device)
