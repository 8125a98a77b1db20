"""Shampoo against loops over eigenvalues, closed forms and the conventions it shares with SOAP."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from effml_optim import Shampoo
from effml_optim.shampoo import inverse_root, shape_blocks
from effml_shared.errors import NonFiniteError
from effml_shared.testing.optimizers import OptimizerKit
from torch import Tensor
from torch.nn import Parameter

F64 = torch.float64


def gaussian(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def naive_power(a: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    values = values.clamp(min=0) + 1e-3 * values.max()
    return sum(values[i] ** -exponent * torch.outer(vectors[:, i], vectors[:, i]) for i in range(len(a)))


class NaiveShampoo:
    """One tensor of one block, with loops over its axes."""

    def __init__(self, weight: Tensor, *, f: int = 1, trace: bool = False, grafting: str = "none") -> None:
        self.weight, self.f, self.trace, self.grafting, self.t = weight.clone(), f, trace, grafting, 0
        self.factors = [torch.zeros(n, n, dtype=F64) for n in weight.shape]
        self.roots: list[Tensor] = []
        self.m, self.v = torch.zeros_like(weight), torch.zeros_like(weight)

    def step(self, g: Tensor, lr: float = 0.1, b1: float = 0.9, b2: float = 0.95, wd: float = 0.1) -> None:
        self.t += 1
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g * g
        m, v, k = self.m / (1 - b1**self.t), self.v / (1 - b2**self.t), g.ndim
        for axis in range(k):
            u = g.movedim(axis, 0).flatten(1) if k > 1 else g[:, None]
            self.factors[axis] = b2 * self.factors[axis] + (1 - b2) * u @ u.T
        target = m / (v.sqrt() + 1e-8) if self.grafting == "adam" else m
        if self.t < self.f and self.grafting != "none":
            self.weight = (self.weight - lr * target) * (1 - lr * wd)
            return
        if self.t <= self.f or self.t % self.f == 0:
            fixed = [a / (1 - b2**self.t) for a in self.factors]
            self.roots = [naive_power(a, 0.5 if self.trace else 1 / (2 * k)) for a in fixed]
            self.scale = float(fixed[0].trace()) ** ((k - 1) / 2) if self.trace else 1.0
        d = self.scale * m
        for axis, root in enumerate(self.roots):
            d = torch.tensordot(d, root, dims=([axis], [0])).movedim(-1, axis)
        if self.grafting != "none":
            d = d * target.norm() / d.norm()
        self.weight = (self.weight - lr * d) * (1 - lr * wd)


OPTIONS: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.95), "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(5, 5), (5, 4), (3, 4, 2), (4,)])
@pytest.mark.parametrize("grafting", ["none", "sgd", "adam"])
@pytest.mark.parametrize(("exponent", "frequency"), [("standard", 1), ("standard", 3), ("trace", 3)])
def test_equals_the_naive_implementation(shape: tuple[int, ...], grafting: str, exponent: str, frequency: int) -> None:
    weight = Parameter(gaussian(0, *shape))
    options = {**OPTIONS, "exponent": exponent, "grafting": grafting, "precondition_frequency": frequency}
    # A stale root of a still singular factor magnifies rounding by a power of the ridge: compare with a larger one.
    optimizer = Shampoo([weight], precondition_1d=True, matrix_eps=1e-3, **options)
    naive = NaiveShampoo(weight.detach(), f=frequency, trace=exponent == "trace", grafting=grafting)
    for k in range(1, 30):
        weight.grad = gaussian(k, *shape)
        naive.step(weight.grad)
        optimizer.step()
    torch.testing.assert_close(weight.detach(), naive.weight, rtol=0, atol=1e-9)


def test_first_step_orthogonalises_the_gradient() -> None:
    """With L = G G^T and R = G^T G, L^(-1/4) G R^(-1/4) = U V^T."""
    weight, grad = Parameter(gaussian(0, 4, 4)), gaussian(1, 4, 4)
    start = weight.detach().clone()
    weight.grad = grad
    Shampoo([weight], lr=1.0, grafting="none", weight_decay=0.0).step()
    u, _, vt = torch.linalg.svd(grad)
    torch.testing.assert_close(start - weight.detach(), u @ vt, rtol=0, atol=1e-8)


def test_inverse_roots_are_relative_symmetric_and_zero_for_zero() -> None:
    root = gaussian(0, 3, 5, 5)
    factor = root @ root.mT
    found = inverse_root(factor, 0.25, eps=0.0)
    eye = torch.eye(5, dtype=F64).expand(3, 5, 5)
    torch.testing.assert_close(torch.linalg.matrix_power(found, 4) @ factor, eye, rtol=0, atol=1e-10)
    torch.testing.assert_close(inverse_root(1e-20 * factor, 0.25), 1e5 * inverse_root(factor, 0.25), rtol=1e-9, atol=0)
    assert not inverse_root(torch.zeros(1, 3, 3), 0.5).any()
    rounded = torch.diag(torch.tensor([1.0, -1e-9], dtype=F64))[None]  # a zero eigenvalue after rounding
    expected = torch.diag(torch.tensor([1.0001**-0.5, 100.0], dtype=F64))[None]
    torch.testing.assert_close(inverse_root(rounded, 0.5, eps=1e-4), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(5, 7), (4, 4), (7,), (2, 5, 3)])
def test_blocks_tile_the_tensor(shape: tuple[int, ...]) -> None:
    count = torch.zeros(shape)
    for block in shape_blocks(shape, 3):
        count[block] += 1
        assert max(count[block].shape) <= 3
    assert (count == 1).all()


def test_blocks_are_separate_parameters() -> None:
    whole = Parameter(gaussian(0, 6, 4))
    parts = [Parameter(whole.detach()[block].clone()) for block in shape_blocks((6, 4), 4)]
    options = {**OPTIONS, "precondition_frequency": 2}
    optimizers = Shampoo([whole], max_preconditioner_dim=4, **options), Shampoo(parts, **options)
    for k in range(1, 6):
        whole.grad = gaussian(k, 6, 4)
        for part, block in zip(parts, shape_blocks((6, 4), 4), strict=True):
            part.grad = whole.grad[block].clone()
        for optimizer in optimizers:
            optimizer.step()
    for part, block in zip(parts, shape_blocks((6, 4), 4), strict=True):
        torch.testing.assert_close(whole.detach()[block], part.detach(), rtol=0, atol=1e-13)


def test_vectors_run_adam_and_vocabularies_can_be_merged() -> None:
    vector, other = Parameter(gaussian(0, 5)), Parameter(gaussian(0, 5))
    optimizer = Shampoo([vector], **{**OPTIONS, "weight_decay": 0.0})
    adam = torch.optim.Adam([other], lr=0.1, betas=(0.9, 0.95))
    for k in range(5):
        vector.grad = gaussian(k, 5)
        other.grad = vector.grad.clone()
        optimizer.step()
        adam.step()
    torch.testing.assert_close(vector, other, rtol=0, atol=1e-13)


def test_scale_of_the_loss_does_not_matter() -> None:
    ends = []
    for scale in (1.0, 1e-6):
        weight = Parameter(gaussian(0, 4, 3))
        optimizer = Shampoo([weight], eps=0.0, **OPTIONS)
        for k in range(1, 8):
            weight.grad = scale * gaussian(k, 4, 3)
            optimizer.step()
        ends.append(weight.detach())
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_non_finite_factors_raise_with_the_name() -> None:
    weight = Parameter(torch.zeros(3, 3))
    weight.grad = torch.full((3, 3), math.inf)
    with pytest.raises(NonFiniteError, match="proj: its factor of size 3"):
        Shampoo([("proj", weight)], precondition_frequency=1).step()


def test_checkpoints_hold_plain_string_keys() -> None:
    weight = Parameter(torch.ones(3, 5))
    weight.grad = torch.ones(3, 5)
    optimizer = Shampoo([weight], max_preconditioner_dim=3, precond_dtype=torch.float64)
    optimizer.step()
    state = copy.deepcopy(optimizer.state[weight])
    assert {"factor_0.0", "factor_1.1", "root_0.0", "root_1.1", "exp_avg", "exp_avg_sq", "step"} < set(state)
    assert state["root_1.1"].shape == (2, 2)
    assert state["root_1.1"].dtype == F64


class TestShampooConformance(OptimizerKit):
    bad_arguments = (
        ("lr", -1.0),
        ("eps", -1.0),
        ("matrix_eps", -1.0),
        ("shampoo_beta", -0.1),
        ("precondition_frequency", 0),
        ("max_preconditioner_dim", 0),
        ("merge_dims", "fan_out"),
        ("exponent", "half"),
        ("grafting", "adagrad"),
        ("precond_dtype", "bfloat16"),
    )

    def make(self, params: Any, **overrides: Any) -> Shampoo:
        return Shampoo(params, **{"lr": 0.03, "precondition_frequency": 3, **overrides})
