"""Which atom of one dictionary is which of another: the assignment of most total cosine.

    S = A B^T  (rows of norm 1)        P* = argmax over one-to-one assignments of sum_i S_{i, P(i)}

Cosines keep their sign: codes are not negative, so an atom and its opposite are different concepts. Up to `exact_up_to`
atoms the assignment is exact (Jonker-Volgenant in SciPy, O(C^3), 12 C^2 bytes). Above, it is exact on a sparse graph:
every atom's nearest `candidates` on the other side, and a greedy complete assignment that makes the graph solvable.
Then `upper_bound`, which no assignment passes, says how much that can have cost. FLOPs of S: 2 C^2 d.
Source: arXiv 2504.11695, section 4 (stability); the sparse form is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_eval.concepts.code_entries import BLOCK, unit_rows

__all__ = ["Matching", "match_dictionaries"]


@dataclass(frozen=True)
class Matching:
    """A one-to-one assignment of the atoms of dictionary A to those of B.

    Attributes:
        partner: (C) int64, the atom of B for each of A; -1 where B has fewer atoms.
        similarity: (C) signed cosine to the partner; NaN where there is none.
        upper_bound: a mean similarity that no assignment passes.
        exact: whether this assignment is the best one for certain.
    """

    partner: Tensor
    similarity: Tensor
    upper_bound: float
    exact: bool

    @property
    def stability(self) -> float:
        """Mean similarity over the matched atoms, min(C, C') of them."""
        return float(self.similarity.double().nanmean())


def match_dictionaries(
    a: Tensor,
    b: Tensor,
    *,
    rectangular: bool = False,
    exact_up_to: int = 8192,
    candidates: int = 50,
) -> Matching:
    """Match the atoms of a (C, d) to those of b (C', d), whatever their norms.

    Args:
        rectangular: allow C and C' to differ; the larger dictionary keeps atoms without a partner.
        exact_up_to: largest number of atoms that is solved exactly.
        candidates: nearest atoms considered above that.

    Raises:
        ConfigError: an atom is 0 or not finite, d differs, or C differs and `rectangular` is not set.

    >>> matching = match_dictionaries(torch.eye(3), torch.eye(3)[[2, 0, 1]])
    >>> matching.partner.tolist(), matching.stability
    ([1, 2, 0], 1.0)
    """
    check_count("exact_up_to", exact_up_to, 0)
    check_count("candidates", candidates, 1)
    first, second = unit_rows("a", a), unit_rows("b", b)
    if first.shape[1] != second.shape[1]:
        raise ConfigError(f"b: got atoms of {second.shape[1]} dimensions beside {first.shape[1]}, expected one space")
    if not len(first) or not len(second):
        raise ConfigError(f"a, b: got {len(first)} and {len(second)} atoms, expected at least one each")
    if len(first) != len(second) and not rectangular:
        raise ConfigError(
            f"b: got {len(second)} atoms beside {len(first)}, expected as many; rectangular=True matches the fewer"
        )
    dtype = torch.promote_types(first.dtype, second.dtype)
    first, second = first.to(dtype), second.to(first.device, dtype)
    flipped = len(first) > len(second)  # so that the solvers always give every row a column
    rows, columns = (second, first) if flipped else (first, second)
    exact = len(columns) <= exact_up_to
    if exact:
        assigned, bound = _assign(rows, columns)
    else:
        assigned, bound = _assign_among_candidates(rows, columns, min(candidates, len(columns)))
    similarity = (rows * columns[assigned]).sum(1)
    if not flipped:
        return Matching(assigned, similarity, bound, exact)
    partner = assigned.new_full((len(first),), -1)
    partner[assigned] = torch.arange(len(assigned), device=assigned.device)
    return Matching(
        partner, similarity.new_full((len(first),), torch.nan).index_copy(0, assigned, similarity), bound, exact
    )


def _assign(rows: Tensor, columns: Tensor) -> tuple[Tensor, float]:
    from scipy.optimize import linear_sum_assignment

    similarity = rows @ columns.T
    bounds = [similarity.amax(1).double().mean()] + [similarity.amax(0).double().mean()] * (len(rows) == len(columns))
    _, assigned = linear_sum_assignment(similarity.cpu().numpy(), maximize=True)
    return torch.from_numpy(assigned.astype(np.int64)).to(rows.device), float(min(bounds))


def _assign_among_candidates(rows: Tensor, columns: Tensor, candidates: int) -> tuple[Tensor, float]:
    """Solve on the graph of nearest neighbours from both sides, joined by a greedy assignment along them."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    edges = [_nearest(rows, columns, candidates)]
    bound = float(edges[0][2].double().view(len(rows), -1)[:, 0].mean())
    back, forth, similarity = _nearest(columns, rows, min(candidates, len(rows)))
    if len(rows) == len(columns):
        bound = min(bound, float(similarity.double().view(len(columns), -1)[:, 0].mean()))
    edges.append((forth, back, similarity))
    i, j, weight = (torch.cat(parts).cpu().numpy() for parts in zip(*edges, strict=True))
    greedy = _greedy(i, j, weight, len(rows), len(columns))
    everyone = np.arange(len(rows))
    extra = (rows * columns[torch.from_numpy(greedy).to(rows.device)]).sum(1).cpu().numpy()
    i, j, weight = np.concatenate([i, everyone]), np.concatenate([j, greedy]), np.concatenate([weight, extra])
    _, once = np.unique(i * len(columns) + j, return_index=True)
    cost = 2.0 - weight[once].astype(np.float64)  # in [1, 3]: the solver takes a cost of 0 for a missing edge
    places = i[once].astype(np.int32), j[once].astype(np.int32)  # the solver of SciPy 1.13 takes no others
    graph = coo_array((cost, places), shape=(len(rows), len(columns))).tocsr()
    _, assigned = min_weight_full_bipartite_matching(graph)
    return torch.from_numpy(assigned.astype(np.int64)).to(rows.device), bound


def _nearest(rows: Tensor, columns: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return edges (row, column, cosine) from each row to its `count` nearest columns, nearest first."""
    size = max(1, BLOCK // len(columns))
    found = [(part @ columns.T).topk(count, dim=1) for part in rows.split(size)]
    indices = torch.cat([part.indices for part in found]).flatten()
    values = torch.cat([part.values for part in found]).flatten()
    return torch.arange(len(rows), device=rows.device).repeat_interleave(count), indices, values


def _greedy(i: np.ndarray, j: np.ndarray, weight: np.ndarray, n_rows: int, n_columns: int) -> np.ndarray:
    """Take edges by falling weight while both ends are free; rows left over get the free columns in order."""
    assigned = np.full(n_rows, -1, dtype=np.int64)
    taken = np.zeros(n_columns, dtype=bool)
    for edge in np.lexsort((j, i, -weight)):
        if assigned[i[edge]] < 0 and not taken[j[edge]]:
            assigned[i[edge]] = j[edge]
            taken[j[edge]] = True
    left = assigned < 0
    assigned[left] = np.flatnonzero(~taken)[: int(left.sum())]
    return assigned
