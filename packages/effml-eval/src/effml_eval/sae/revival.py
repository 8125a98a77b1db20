"""Revive dead concepts: let them explain what the living leave over.

Among the concepts that have not fired for long, the k_aux = min(d / 2, how many there are) of largest pre-activation
decode the residual e = stopgrad(x - x_hat), without the pre-bias:

    L = min(1, #dead / (d / 2)) * sum ||e - e_hat||^2 / sum ||e - mean(e)||^2      (sums over rows, mean per dimension)

(arXiv 2406.04093, appendix A.2; the factor keeps a few dead concepts from being pushed as hard as many).
Its gradient reaches encoder and atoms of the dead concepts selected whose pre-activation is above 0, and nothing else.
State: none. Cost: an encoder's over the dead concepts, plus 8 N k_aux d FLOPs; nothing while all live.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from effml_shared import distributed
from torch import Tensor

from effml_eval.sae import selection
from effml_eval.sae.sparse_decode import sparse_decode
from effml_eval.sae.sparse_encode import encode_at

__all__ = ["revival_loss"]


def revival_loss(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dictionary: Tensor, dead: Tensor) -> Tensor:
    """Return L, a scalar; 0 where no concept is dead or the residual does not vary.

    With several processes, the sums run over the global batch, and the mean of the ranks' values is L.

    Args:
        x: what the encoder sees (N, d), cut off from the pre-bias.
        residual: x - x_hat (N, d).
        weight, bias: encoder (C, d) and (C,).
        dictionary: (C, d).
        dead: (C,) bool.
    """
    residual = residual.detach()
    spread = _spread(residual)
    candidates = dead.nonzero().flatten()
    if not len(candidates) or not float(spread) > 0:
        return residual.new_zeros(())
    most = max(1, x.shape[1] // 2)
    with torch.no_grad():
        found = selection.topk(
            x.detach(), weight.detach()[candidates], bias.detach()[candidates], min(most, len(candidates))
        )
        indices = candidates[found.indices]
    values = encode_at(x, weight, bias, found.values, indices)
    missed = (residual - sparse_decode(values, indices, dictionary, inert_zeros=True)).square().sum()
    return min(1.0, len(candidates) / most) * distributed.world_size() * missed / spread


def _spread(residual: Tensor) -> Tensor:
    """Return the sum of squares about the mean of each dimension, over all ranks."""
    if distributed.world_size() == 1:
        return (residual - residual.mean(0)).square().sum() if len(residual) else residual.new_zeros(())
    count = residual.new_full((1,), len(residual))
    sums = torch.cat([residual.sum(0), residual.square().sum()[None], count]).double()
    dist.all_reduce(sums)
    return (sums[-2] - sums[:-2].square().sum() / sums[-1]).to(residual.dtype)
