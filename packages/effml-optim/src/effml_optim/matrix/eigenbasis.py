"""The slowly turning eigenbasis of Shampoo's factors, as pure functions on stacks of same-shape tensors.

A stack `x` is (bucket, n_1, ..., n_d): `bucket` parameters of one layout, worked on by one batched product each. Axis i
of a tensor (dimension i + 1 of its stack) may carry a factor, a stack (bucket, n_i, n_i): the running mean of
`unfold_i(G) unfold_i(G)^T` over gradients G; and a basis of the same shape, whose orthonormal *columns* estimate the
factor's eigenvectors. An axis without a basis is left as it is: nothing stored, nothing multiplied.

State: none here. Cost for a matrix m x n, a multiply-add counted as 2 FLOPs: `rotate` and `unrotate` 2 mn(m + n)
each, the two factor updates 2 mn(m + n) together; `refresh_basis` 2 d^3 for one product plus 8/3 d^3 for a Householder
QR per side of size d (about 9 d^3 for `"eigh"`).

Source: Shampoo, arXiv 1802.09568; SOAP, arXiv 2409.11321, section 4 and algorithms 3 and 4; the staleness measure and
refreshing by it, arXiv 2506.03595.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from effml_optim.matrix.products import average_gram_, matmul

__all__ = [
    "eigenvectors",
    "first_basis",
    "mode_product",
    "refresh_basis",
    "rotate",
    "staleness",
    "symmetric_eigh",
    "turn_first_moment",
    "turn_second_moment",
    "unrotate",
    "update_factor_",
]


def mode_product(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Contract axis `axis` of every tensor in the stack `x` with the rows of its own matrix.

    Args:
        x: (bucket, n_1, ..., n_d).
        matrix: (bucket, n, p) with n the size of that axis; the result has p there.
        axis: 0 for n_1.

    >>> x, q = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    >>> torch.allclose(mode_product(x, q, axis=1), x @ q)
    True
    """
    bucket, n, p = matrix.shape
    dim = axis + 1
    result_shape = (*x.shape[:dim], p, *x.shape[dim + 1 :])
    if dim == x.ndim - 1:
        return matmul(x.reshape(bucket, -1, n), matrix).reshape(result_shape)
    if dim == 1:
        return matmul(matrix.mT, x.reshape(bucket, n, -1)).reshape(result_shape)
    moved = x.movedim(dim, -1)
    return matmul(moved.reshape(bucket, -1, n), matrix).reshape(*moved.shape[:-1], p).movedim(-1, dim)


def rotate(x: Tensor, bases: Mapping[int, Tensor]) -> Tensor:
    """Express every tensor of the stack in its bases: Q_L^T X Q_R for matrices. `bases` maps an axis to its stack.

    Products run in the dtype of the bases; the result has that of `x`.
    """
    result = x
    for axis, basis in bases.items():
        result = mode_product(result.to(basis.dtype), basis, axis)
    return result.to(x.dtype)


def unrotate(x: Tensor, bases: Mapping[int, Tensor]) -> Tensor:
    """Undo `rotate`: Q_L X Q_R^T for matrices."""
    return rotate(x, {axis: basis.mT for axis, basis in bases.items()})


def update_factor_(factor: Tensor, x: Tensor, axis: int, beta: float, alpha: float | None = None) -> Tensor:
    """Average the Gram matrices of axis `axis` into `factor` in place: beta * factor + alpha * U U^T.

    Args:
        factor: (bucket, n, n), changed in place.
        x: gradients (bucket, n_1, ..., n_d), in bfloat16 for a product in bfloat16; U is `x` unfolded to
            (bucket, n, all the rest).
        alpha: None for 1 - beta.
    """
    bucket, n = factor.shape[:2]
    dim = axis + 1
    if dim == x.ndim - 1:  # the rest already stands in rows: transpose instead of copying
        unfolded = x.reshape(bucket, -1, n).mT
    else:
        unfolded = x.movedim(dim, 1).reshape(bucket, n, -1)
    return average_gram_(factor, unfolded, beta, 1 - beta if alpha is None else alpha)


def symmetric_eigh(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (bucket, n), ascending, and eigenvectors (bucket, n, n) of finite symmetric matrices.

    Where the solver does not converge, that one matrix is tried again in float64, then with a ridge of 1e-12 of its
    mean eigenvalue; if that fails too, its diagonal (unsorted) and the identity are returned, with a warning.
    """
    try:
        return torch.linalg.eigh(factor)
    except torch.linalg.LinAlgError:
        pairs = [_eigh_of_one(matrix) for matrix in factor]
        return torch.stack([values for values, _ in pairs]), torch.stack([vectors for _, vectors in pairs])


def _eigh_of_one(matrix: Tensor) -> tuple[Tensor, Tensor]:
    identity = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)
    for ridge in (0.0, 1e-12):
        wide = matrix.double()
        try:
            values, vectors = torch.linalg.eigh(wide + ridge * wide.diagonal().mean() * identity)
        except torch.linalg.LinAlgError:
            continue
        return values.to(matrix), vectors.to(matrix)
    message = f"no eigenvectors found for a factor of size {len(matrix)}: keeping the identity as its basis"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return matrix.diagonal().clone(), identity.to(matrix)


def eigenvectors(factor: Tensor) -> Tensor:
    """Eigenvectors of each factor as columns, by descending eigenvalue.

    The basis of an eigenspace of more than one dimension is whatever the LAPACK or cuSOLVER build returns.
    """
    return symmetric_eigh(factor)[1].flip(-1)


def first_basis(x: Tensor, axis: int) -> Tensor:
    """Eigenvectors of the Gram matrix of one gradient along `axis`, by descending eigenvalue: (bucket, n, n).

    One gradient leaves eigenvectors undetermined: the longer side of a matrix m x n has a null space of |m - n|
    dimensions, and a solver returns any basis of it. Here directions with less than 1e-6 of the largest singular value
    count as null space, and fixed pseudorandom vectors, orthogonalised, complete the others to a basis: the same on
    every machine and world size up to the signs of columns, which change nothing, and cheaper than eigenvectors of the
    longer side. (Ours: the paper leaves the null space to the solver.)

    Args:
        x: gradients (bucket, n_1, ..., n_d), finite.
    """
    bucket, n = len(x), x.shape[axis + 1]
    unfolded = x.movedim(axis + 1, 1).reshape(bucket, n, -1).double()  # squaring in float32 would lose small directions
    short = unfolded if n <= unfolded.shape[-1] else unfolded.mT
    values, vectors = symmetric_eigh(short @ short.mT)
    spanning = (vectors if short is unfolded else unfolded @ vectors).flip(-1)
    known = values.flip(-1) > 1e-12 * values.amax(dim=-1, keepdim=True)
    columns = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).to(x.device)
    columns = columns.expand(bucket, -1, -1).clone()
    found = spanning.shape[-1]
    columns[..., :found] = torch.where(known.unsqueeze(-2), spanning, columns[..., :found])
    return torch.linalg.qr(columns).Q.to(x.dtype)


def refresh_basis(factor: Tensor, basis: Tensor, method: str = "qr") -> Tensor:
    """Bring each basis nearer to the eigenvectors of its factor, every column staying where it was.

    One step of orthogonal iteration: orthonormalise P = A Q, columns taken by descending Rayleigh quotient, because
    each is cleaned of those before it. The result is then put back in the order of `basis`. Sorting the basis instead
    would demand sorting the second moments with it; this way they stay attached to their directions untouched.

    Args:
        factor: A, (bucket, n, n).
        basis: Q, (bucket, n, n), orthonormal columns.
        method: `"qr"` Householder; `"cholqr"` two rounds of Cholesky QR in float64, which batch well on a GPU, and
            Householder for those matrices where it fails; `"eigh"` the exact eigenvectors.

    >>> turned = torch.tensor([[[0.8, -0.6], [0.6, 0.8]]])
    >>> refresh_basis(torch.diag(torch.tensor([4.0, 1.0]))[None], turned, method="eigh").abs()
    tensor([[[1., 0.],
             [0., 1.]]])
    """
    product = matmul(factor, basis)
    bucket, n, _ = product.shape
    # LAPACK stores columns; at a power-of-two distance they share cache sets, so large ones get eight zeros more: 1.2x.
    # All steps happen in this one array, because fresh memory costs a CPU as much as the products.
    padding = 8 if n >= 256 and method == "qr" and product.device.type == "cpu" else 0
    columns = product.new_empty(bucket, n, n + padding)  # of P, each as a row
    columns[..., n:] = 0
    sorted_columns = columns[..., :n]
    quotients = torch.mul(basis.mT, product.mT, out=sorted_columns).sum(dim=-1)
    order = quotients.argsort(dim=-1, descending=True, stable=True)
    if method == "eigh":
        sorted_columns.copy_(eigenvectors(factor).mT)
    else:
        _take_rows(product.mT, order, out=sorted_columns)
        orthonormalised = _cholesky_qr(columns.mT) if method == "cholqr" else _householder_(columns.mT)
        sorted_columns = orthonormalised.mT[..., :n]
    return _put_rows(sorted_columns, order, out=product).mT


def _take_rows(x: Tensor, order: Tensor, *, out: Tensor) -> None:
    if len(x) == 1:  # whole rows at a time
        torch.index_select(x[0], 0, order[0], out=out[0])
    else:
        torch.gather(x, -2, order.unsqueeze(-1).expand_as(x), out=out)


def _put_rows(x: Tensor, order: Tensor, *, out: Tensor) -> Tensor:
    if len(x) == 1:
        out[0].index_copy_(0, order[0], x[0])
        return out
    return out.scatter_(-2, order.unsqueeze(-1).expand_as(x), x)


def _householder_(p: Tensor) -> Tensor:
    """Orthonormalise the columns of p, (bucket, m, n) with m >= n; on a CPU in place."""
    if p.device.type != "cpu":
        return torch.linalg.qr(p).Q
    tau = p.new_empty(len(p), p.shape[-1])
    torch.geqrf(p, out=(p, tau))
    return torch.linalg.householder_product(p, tau, out=p)


def _cholesky_qr(p: Tensor) -> Tensor:
    # Equal column norms take the spread of eigenvalues out of the condition number, the Gram matrix squares what is
    # left: hence float64. After the first round columns are nearly orthonormal, the second makes them so.
    q = p.double()
    q = q / q.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    failed = torch.zeros(len(q), dtype=torch.bool, device=q.device)
    for _ in range(2):
        triangle, info = torch.linalg.cholesky_ex(q.mT @ q)
        failed |= info != 0
        triangle = torch.where(failed[:, None, None], identity, triangle)
        q = torch.linalg.solve_triangular(triangle.mT, q, upper=True, left=False)
    bound = 10 * q.shape[-1] * torch.finfo(q.dtype).eps
    failed |= ~((q.mT @ q - identity).abs().amax(dim=(-2, -1)) < bound)  # the negation also catches NaN
    q = q.to(p.dtype)
    if failed.any():
        q[failed] = _householder_(p[failed])
    return q


def staleness(factor: Tensor, basis: Tensor) -> Tensor:
    """How far each basis is from diagonalising its factor: ||offdiag(B)||_F / ||B||_F, B = Q^T A Q, as (bucket,).

    It is the relative error of approximating A by Q diag(B) Q^T: 0 for eigenvectors, and 0 for a zero factor.
    """
    b = basis.mT @ factor @ basis
    off_diagonal = b - torch.diag_embed(b.diagonal(dim1=-2, dim2=-1))
    return off_diagonal.norm(dim=(-2, -1)) / b.norm(dim=(-2, -1)).clamp_min(torch.finfo(b.dtype).tiny)


def turn_first_moment(moment: Tensor, old: Tensor, new: Tensor, axis: int) -> Tensor:
    """Re-express rotated momenta after one axis got a new basis: out of the old one, into the new one, exactly.

    Two products of 2 n numel FLOPs are never dearer over all sides than forming Q_old^T Q_new first.
    """
    return mode_product(mode_product(moment, old.mT, axis), new, axis)


def turn_second_moment(moment: Tensor, old: Tensor, new: Tensor, axis: int) -> Tensor:
    """Carry rotated second moments into a new basis as if coordinates were uncorrelated: V <- (T o T)^T V.

    T = Q_old^T Q_new; the rows of T o T sum to one, so the total is kept and nothing becomes negative.
    """
    return mode_product(moment, (old.mT @ new).square(), axis)
