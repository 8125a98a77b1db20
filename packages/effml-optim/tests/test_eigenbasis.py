"""The pure functions against loops, closed forms and each other, in float64."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from effml_optim.matrix.eigenbasis import (
    eigenvectors,
    mode_product,
    refresh_basis,
    rotate,
    staleness,
    symmetric_eigh,
    turn_first_moment,
    turn_second_moment,
    unrotate,
    update_factor_,
)
from torch import Tensor

METHODS = ("qr", "cholqr", "eigh")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthogonal(bucket: int, n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(gaussian(bucket, n, n, seed=seed)).Q


def positive(bucket: int, n: int, seed: int = 0) -> Tensor:
    root = gaussian(bucket, n, n, seed=seed)
    return root @ root.mT


@pytest.mark.parametrize("shape", [(4,), (4, 5), (3, 4, 5), (2, 3, 4, 5)])
def test_mode_products_equal_tensordot(shape: tuple[int, ...]) -> None:
    x = gaussian(2, *shape)
    for axis, n in enumerate(shape):
        matrix = gaussian(2, n, 6, seed=axis)
        expected = [torch.tensordot(x[b], matrix[b], dims=([axis], [0])).movedim(-1, axis) for b in range(2)]
        torch.testing.assert_close(mode_product(x, matrix, axis), torch.stack(expected), rtol=0, atol=1e-13)


def test_rotation_of_matrices_and_back() -> None:
    x, bases = gaussian(3, 4, 5), {0: orthogonal(3, 4), 1: orthogonal(3, 5)}
    rotated = rotate(x, bases)
    torch.testing.assert_close(rotated, bases[0].mT @ x @ bases[1], rtol=0, atol=1e-14)
    torch.testing.assert_close(unrotate(rotated, bases), x, rtol=0, atol=1e-14)
    assert rotate(x, {}) is x


@pytest.mark.parametrize("shape", [(4,), (4, 5), (3, 4, 5)])
def test_factors_average_gram_matrices(shape: tuple[int, ...]) -> None:
    x = gaussian(2, *shape)
    for axis, n in enumerate(shape):
        before = positive(2, n)
        unfolded = x.movedim(axis + 1, 1).reshape(2, n, -1)
        expected = 0.9 * before + 0.1 * torch.stack([u @ u.T for u in unfolded])
        torch.testing.assert_close(update_factor_(before.clone(), x, axis, 0.9), expected, rtol=0, atol=1e-13)


def test_first_basis_diagonalises_in_descending_order() -> None:
    factor = positive(3, 5)
    basis = eigenvectors(factor)
    diagonal = (basis.mT @ factor @ basis).diagonal(dim1=-2, dim2=-1)
    assert (diagonal.diff(dim=-1) < 0).all()
    assert (staleness(factor, basis) < 1e-14).all()


def test_refreshing_turns_the_basis_by_the_ratio_of_eigenvalues() -> None:
    angle, factor = 0.3, torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))[None]
    cos, sin = math.cos(angle), math.sin(angle)
    basis = torch.tensor([[[cos, -sin], [sin, cos]]], dtype=torch.float64)
    for expected in (0.07733406, 0.01933352, 0.00483338):
        basis = refresh_basis(factor, basis)
        assert float((basis[0, 1, 0] / basis[0, 0, 0]).abs()) == pytest.approx(expected, abs=5e-9)


def test_refreshing_equals_the_explicit_qr_algorithm() -> None:
    """Sort the columns of Q, let Q^T A Q = Q1 R1, take Q Q1: the same columns, sorted, up to sign."""
    factor, basis = positive(3, 6), orthogonal(3, 6, seed=1)
    order = (basis.mT @ factor @ basis).diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True)
    columns = order[:, None, :].expand_as(basis)
    sorted_basis = basis.gather(-1, columns)
    expected = sorted_basis @ torch.linalg.qr(sorted_basis.mT @ factor @ sorted_basis).Q
    fresh = refresh_basis(factor, basis).gather(-1, columns)
    torch.testing.assert_close(fresh.abs(), expected.abs(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cholesky_qr_equals_householder_up_to_sign(dtype: torch.dtype) -> None:
    factor, basis = positive(4, 20).to(dtype), orthogonal(4, 20, seed=1).to(dtype)
    fresh, expected = (refresh_basis(factor, basis, method) for method in ("cholqr", "qr"))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(fresh.abs(), expected.abs(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_rank_deficient_factors_give_orthonormal_bases(method: str, rank: int) -> None:
    root = gaussian(2, 8, rank).float()
    hard = root @ root.mT
    spread = torch.diag_embed(torch.logspace(0, -14, 8)).expand(1, 8, 8)  # conditioned beyond float32
    factor = torch.cat([hard, positive(1, 8).float(), spread])
    basis = refresh_basis(factor, orthogonal(4, 8).float(), method)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(8).expand(4, 8, 8), rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_converges_to_eigenvectors_keeping_columns_apart(method: str) -> None:
    factor = torch.diag(torch.tensor([1.0, 9.0, 3.0], dtype=torch.float64))[None]
    basis = torch.linalg.qr(torch.eye(3, dtype=torch.float64) + 0.1 * gaussian(3, 3)).Q[None]
    for _ in range(40):
        basis = refresh_basis(factor, basis, method)
    torch.testing.assert_close(basis.abs(), torch.eye(3, dtype=torch.float64)[None], rtol=0, atol=1e-12)
    assert float(staleness(factor, basis)) < 1e-12


def test_staleness_is_the_error_of_the_diagonal_approximation() -> None:
    factor, basis = positive(3, 5), orthogonal(3, 5)
    diagonal = torch.diag_embed((basis.mT @ factor @ basis).diagonal(dim1=-2, dim2=-1))
    error = (factor - basis @ diagonal @ basis.mT).norm(dim=(-2, -1)) / factor.norm(dim=(-2, -1))
    torch.testing.assert_close(staleness(factor, basis), error, rtol=0, atol=1e-14)
    assert staleness(torch.zeros_like(factor), basis).tolist() == [0.0, 0.0, 0.0]


def test_momentum_survives_a_change_of_basis() -> None:
    x, old, new = gaussian(2, 4, 5), orthogonal(2, 5), orthogonal(2, 5, seed=1)
    moved = turn_first_moment(rotate(x, {1: old}), old, new, 1)
    torch.testing.assert_close(moved, rotate(x, {1: new}), rtol=0, atol=1e-14)


def test_square_transport_keeps_the_total_and_follows_signed_permutations() -> None:
    moment, old, new = gaussian(2, 4, 5).square(), orthogonal(2, 4), orthogonal(2, 4, seed=1)
    moved = turn_second_moment(moment, old, new, 0)
    assert (moved >= 0).all()
    torch.testing.assert_close(moved.sum(dim=1), moment.sum(dim=1), rtol=0, atol=1e-13)
    order = torch.tensor([2, 0, 3, 1])
    flipped = old[..., order] * torch.tensor([1.0, -1.0, 1.0, -1.0])
    torch.testing.assert_close(turn_second_moment(moment, old, flipped, 0), moment[:, order], rtol=0, atol=1e-13)


def test_failing_eigensolver_is_retried_and_at_last_replaced_by_the_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    real, factor = torch.linalg.eigh, positive(2, 3).float()

    def only_float64(matrix: Tensor) -> Any:
        if matrix.dtype != torch.float64:
            raise torch.linalg.LinAlgError("no convergence")
        return real(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", only_float64)
    values, vectors = symmetric_eigh(factor)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors @ torch.diag_embed(values) @ vectors.mT, factor, rtol=1e-5, atol=1e-5)

    def never(matrix: Tensor) -> Any:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.linalg, "eigh", never)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values, vectors = symmetric_eigh(factor)
    assert torch.equal(vectors, torch.eye(3).expand(2, 3, 3))
    assert torch.equal(values, factor.diagonal(dim1=-2, dim2=-1))
    assert "identity" in str(caught[0].message)
