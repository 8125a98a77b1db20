"""Keep atoms at unit norm around an optimizer step, in place and in one pass over each tensor.

Before the step, `g_i -= <g_i, d_i> d_i / ||d_i||^2` removes what would only change a norm; after it, `d_i /= ||d_i|| +
eps` restores norms. On the CPU the C kernels serve; sharded and other tensors take torch's. State: none.
"""

from __future__ import annotations

import math

from torch import Tensor

from effml_eval.sae import native

__all__ = ["normalize_rows_", "remove_parallel_"]


def remove_parallel_(gradient: Tensor, atoms: Tensor) -> None:
    """Take from each row of a gradient (C, d) its part along the atom; where an atom is 0, nothing."""
    if native.serves(gradient, atoms) and gradient.is_contiguous() and atoms.is_contiguous():
        native.run("remove_parallel", atoms.dtype, len(atoms), atoms.shape[1], atoms, gradient)
        return
    square = atoms.square().sum(1, keepdim=True)
    along = (gradient * atoms).sum(1, keepdim=True) / square.masked_fill(square == 0, 1)
    gradient.sub_(along * atoms)


def normalize_rows_(atoms: Tensor, eps: float) -> None:
    """Divide each row of atoms (C, d) by its norm plus eps; a row of infinite norm becomes NaN, so that it shows."""
    if native.serves(atoms) and atoms.is_contiguous():
        native.run("normalize_rows", atoms.dtype, len(atoms), atoms.shape[1], eps, atoms)
        return
    norms = atoms.norm(dim=1, keepdim=True) + eps
    atoms.div_(norms.masked_fill(norms.isinf(), math.nan))
