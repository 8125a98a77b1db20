"""Mazes of n x n cells: random passages, the shortest paths between all cells, and a strict test of given paths.

Cells are numbered row by row. A random walk that backs out of dead ends makes a perfect maze, in which exactly one path
joins any two cells; then each wall that is left inside falls with probability `loops`. Of several shortest paths the
one that breadth-first search finds first counts, neighbours being taken in ascending order, so a path is a function of
its ends. Walls drawn as pixels make a picture of (2n + 1) x (2n + 1).

Cost: the tables of distances and paths take n^4 steps in Python, once: 0.1 s for n = 20; memory 8 n^4 bytes.

Source: the maze task of arXiv 2509.01025, whose details are not published; sizes and success as we define them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from random import Random

import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.seeding import derive_seed
from torch import Tensor

__all__ = ["Maze"]


@dataclass(frozen=True)
class Maze:
    """Cells and passages between neighbouring ones.

    Attributes:
        n: cells of a side.
        passages: pairs of cells (lower, higher), ascending.

    >>> maze = Maze.random(3, loops=0.0, seed=1)
    >>> len(maze.passages), maze.path(0, 0)
    (8, [0])
    """

    n: int
    passages: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        check_count("n", self.n, 2)
        walls = {pair for cell in range(self.cells) for pair in _pairs(self.n, cell)}
        wrong = next((pair for pair in self.passages if pair not in walls), None)
        if wrong is not None:
            raise ConfigError(
                f"passages: got {wrong}, expected pairs of neighbours (lower, higher) of {self.n} x {self.n}"
            )
        if tuple(sorted(set(self.passages))) != self.passages:
            raise ConfigError("passages: got repeated or unsorted pairs, expected each once, ascending")
        if -1 in self._searched_from(0)[0]:
            raise ConfigError("passages: got cells that no path reaches, expected a connected maze")

    @classmethod
    def random(cls, n: int, *, loops: float = 0.15, seed: int = 0) -> Maze:
        """Return a maze of n x n cells.

        Args:
            loops: probability that a wall of the perfect maze is opened, in [0, 1].
        """
        check_count("n", n, 2)
        if not 0 <= loops <= 1:
            raise ConfigError(f"loops: got {loops}, expected a number in [0, 1]")
        rng = Random(derive_seed(seed, "maze", n))
        every = [_pairs(n, cell) for cell in range(n * n)]
        beside: list[list[int]] = [[] for _ in every]
        for a, b in (pair for pairs in every for pair in pairs):
            beside[a].append(b)
            beside[b].append(a)
        start = rng.randrange(n * n)
        open_pairs, visited, trail = set(), {start}, [start]
        while trail:
            fresh = [cell for cell in beside[trail[-1]] if cell not in visited]
            if not fresh:
                trail.pop()
                continue
            cell = rng.choice(fresh)
            open_pairs.add((min(trail[-1], cell), max(trail[-1], cell)))
            visited.add(cell)
            trail.append(cell)
        for pair in (pair for pairs in every for pair in pairs if pair not in open_pairs):
            if rng.random() < loops:
                open_pairs.add(pair)
        return cls(n, tuple(sorted(open_pairs)))

    @property
    def cells(self) -> int:
        """Number of cells."""
        return self.n**2

    @cached_property
    def distances(self) -> Tensor:
        """(cells, cells) int32: steps of a shortest path."""
        return self._searched[0]

    @cached_property
    def before(self) -> Tensor:
        """(cells, cells) int32: at [start, cell], the cell before `cell` on the path from start; start itself there."""
        return self._searched[1]

    def path(self, start: int, goal: int) -> list[int]:
        """Return the cells of the shortest path, both ends included."""
        for name, cell in (("start", start), ("goal", goal)):
            if not 0 <= cell < self.cells:
                raise ConfigError(f"{name}: got {cell}, expected a cell from 0 to {self.cells - 1}")
        path = [goal]
        while path[-1] != start:
            path.append(int(self.before[start, path[-1]]))
        return path[::-1]

    def through(self, waypoints: Sequence[int]) -> list[int]:
        """Return the cells of the shortest paths from each waypoint to the next, joined; ConfigError if two are equal.

        >>> maze = Maze.random(4)
        >>> maze.through([0, 9, 5])[0], maze.through([0, 9, 5])[-1]
        (0, 5)
        """
        if len(waypoints) < 2 or any(a == b for a, b in pairwise(waypoints)):
            raise ConfigError(f"waypoints: got {list(waypoints)}, expected at least two, no two in a row equal")
        legs = [self.path(a, b) for a, b in pairwise(waypoints)]
        return [waypoints[0], *(cell for leg in legs for cell in leg[1:])]

    def solved(self, ids: Tensor, lengths: Tensor, waypoints: Tensor) -> Tensor:
        """Return which paths are right, (batch,) bool.

        A path is right if it begins and ends at the first and the last waypoint, every step leads through a passage,
        and it comes to all waypoints in their order. It need not be a shortest one.

        Args:
            ids: (batch, seq) cells; what is no cell, as a mask, is an error of the path.
            lengths: (batch,) tokens of each path.
            waypoints: (batch, stops).
        """
        _check_batch(ids, lengths, waypoints)
        if not ids.shape[1]:
            return torch.zeros_like(lengths, dtype=torch.bool)
        column = torch.arange(ids.shape[1], device=ids.device)
        real = column < lengths[:, None]
        cells = ids.clamp(0, self.cells - 1).long()
        inside = ((ids == cells) | ~real).all(1)
        joined = self._joined.to(ids.device)[cells[:, :-1], cells[:, 1:]]
        steps = (joined | ~real[:, 1:]).all(1)
        last = cells.gather(1, (lengths[:, None] - 1).clamp(0, ids.shape[1] - 1))[:, 0]
        ends = (cells[:, 0] == waypoints[:, 0]) & (last == waypoints[:, -1])
        stops = waypoints.shape[1]
        met = torch.zeros_like(lengths)
        for here, exists in zip(cells.unbind(1), real.unbind(1), strict=True):
            wanted = waypoints.gather(1, met.clamp(max=stops - 1)[:, None])[:, 0]
            met += (here == wanted) & exists & (met < stops)
        within = (lengths >= 1) & (lengths <= ids.shape[1])
        return within & inside & steps & ends & (met == stops)

    def shortest(self, waypoints: Tensor) -> Tensor:
        """Return the tokens of a shortest path through waypoints (batch, stops), (batch,) int64; for length ratios."""
        table = self.distances.to(waypoints.device)
        return 1 + table[waypoints[:, :-1], waypoints[:, 1:]].long().sum(1)

    @cached_property
    def pixels(self) -> Tensor:
        """(2n + 1, 2n + 1) bool: True where there is a wall; the cell (r, c) is the pixel (2r + 1, 2c + 1)."""
        walls = torch.ones(2 * self.n + 1, 2 * self.n + 1, dtype=torch.bool)
        walls[1::2, 1::2] = False
        for a, b in self.passages:
            walls[a // self.n + b // self.n + 1, a % self.n + b % self.n + 1] = False
        return walls

    @cached_property
    def _joined(self) -> Tensor:
        """(cells, cells) bool: neighbours with a passage."""
        return self.distances == 1

    @cached_property
    def _neighbours(self) -> list[list[int]]:
        beside: list[list[int]] = [[] for _ in range(self.cells)]
        for a, b in self.passages:
            beside[a].append(b)
            beside[b].append(a)
        return [sorted(cells) for cells in beside]

    @cached_property
    def _searched(self) -> tuple[Tensor, Tensor]:
        distances, before = zip(*map(self._searched_from, range(self.cells)), strict=True)
        return torch.tensor(distances, dtype=torch.int32), torch.tensor(before, dtype=torch.int32)

    def _searched_from(self, start: int) -> tuple[list[int], list[int]]:
        """Return the distance of every cell from start, -1 if there is no path, and the cell before it."""
        distance, before = [-1] * self.cells, [start] * self.cells
        distance[start] = 0
        frontier = [start]
        for cell in frontier:  # which grows meanwhile
            for other in self._neighbours[cell]:
                if distance[other] < 0:
                    distance[other], before[other] = distance[cell] + 1, cell
                    frontier.append(other)
        return distance, before


def _pairs(n: int, cell: int) -> list[tuple[int, int]]:
    """Return the cell with its right and its lower neighbour."""
    right = [(cell, cell + 1)] if (cell + 1) % n else []
    return right + ([(cell, cell + n)] if cell + n < n * n else [])


def _check_batch(ids: Tensor, lengths: Tensor, waypoints: Tensor) -> None:
    for name, given, dims in (("ids", ids, 2), ("lengths", lengths, 1), ("waypoints", waypoints, 2)):
        if given.ndim != dims or len(given) != len(ids) or given.is_floating_point():
            form = "(batch,)" if dims == 1 else "(batch, any)"
            raise ConfigError(f"{name}: got {given.dtype} {tuple(given.shape)}, expected integers {form}")
    if not waypoints.shape[1]:
        raise ConfigError("waypoints: got none, expected at least one per row")
