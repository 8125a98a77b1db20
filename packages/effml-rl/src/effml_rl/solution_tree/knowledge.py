"""What can be known of a solution-tree world from its training data: the wall that no policy gradient passes.

T[s, a] is arbitrary, so a pair (s, a) that training data never show can only be guessed; a path is solvable from them
if all its pairs are seen. Coverage beyond the solvable share needs guesses that reinforcement learning finds and keeps.

Source: arXiv 2505.22756, synthetic task; counting unseen pairs per path is our own.
"""

from __future__ import annotations

import numpy as np
from effml_shared.errors import ConfigError
from numpy.typing import NDArray

from effml_rl.solution_tree.examples import Examples
from effml_rl.solution_tree.tables import Tables

__all__ = ["seen_pairs", "solvable", "unseen_pairs"]


def seen_pairs(tables: Tables, examples: Examples) -> NDArray[np.bool_]:
    """Return which (state, action) pairs occur, (states, actions) bool; sets of problems combine by `|`."""
    seen = np.zeros(tables.transitions.shape, bool)
    kept = examples.actions >= 0
    seen[examples.states[:, :-1][kept], examples.actions[kept]] = True
    return seen


def unseen_pairs(examples: Examples, seen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return how many different unseen pairs the right path of each problem needs, (problems,)."""
    if seen.dtype != bool or seen.ndim != 2:
        raise ConfigError(f"seen: got {seen.dtype} of shape {seen.shape}, expected bool (states, actions)")
    pairs = np.where(examples.actions >= 0, examples.states[:, :-1] * seen.shape[1] + examples.actions, -1)
    pairs.sort(axis=1)
    unseen = (pairs >= 0) & ~seen.ravel()[pairs]
    unseen[:, 1:] &= pairs[:, 1:] != pairs[:, :-1]
    return unseen.sum(1)


def solvable(examples: Examples, seen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return of each problem whether every pair of its right path is seen, (problems,) bool."""
    return unseen_pairs(examples, seen) == 0
