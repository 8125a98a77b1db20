"""Shortest paths through waypoints of one maze, as an endless source of token ids.

Tokens are the cells 0 .. n^2 - 1, then the mask, then the pad. A sample has a start, a goal and `inner` waypoints
between, uniform but for no two in a row being equal; samples longer than `max_length` are drawn again. The waypoints
are given (`fixed`), and nothing may be inserted before the first or after the last (`closed`), as `FlexMDM` takes it.

Models of fixed length have to place the waypoints before they know the path. `canvas` lays every sample on so many
tokens, waypoints at equal distances, each followed by the path to the next and by pads; `remove_pads` undoes it.

Cost: a few operations per token of the batch, no Python per row.

Source: the maze task of arXiv 2509.01025; what the authors' baseline does in detail is not published.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_diffusion.puzzles.maze import Maze
from effml_diffusion.puzzles.sample_stream import splitmix

__all__ = ["MazePaths", "remove_pads"]

_ROUNDS = 1000


class MazePaths:
    """A source for `SampleStream`.

    Batches hold `input_ids` (rows, seq) int64, padded; `lengths` (rows,) int64; `waypoints` (rows, inner + 2) int64;
    `fixed` (rows, seq) bool, True at waypoints; `closed` (rows, seq + 1) bool. With a canvas, seq is its length, and
    `lengths` are still those of the paths.

    Args:
        inner: waypoints between start and goal.
        max_length: of a path in tokens; None: any.
        canvas: tokens of a sample of fixed length; None: the samples as they are.

    Raises:
        ConfigError: the canvas is too short for the longest shortest path between two waypoints.
    """

    def __init__(self, maze: Maze, inner: int = 2, *, max_length: int | None = None, canvas: int | None = None) -> None:
        check_count("inner", inner, 0)
        if max_length is not None:
            check_count("max_length", max_length, inner + 2)
        self.maze, self.inner, self.max_length, self.canvas = maze, inner, max_length, canvas
        self.mask_id, self.pad_id, self.vocab_size = maze.cells, maze.cells + 1, maze.cells + 2
        self.spacing = 0  # tokens from one waypoint to the next on the canvas
        if canvas is not None:
            check_count("canvas", canvas, inner + 2)
            self.spacing = (canvas - 1) // (inner + 1)
            longest = int(maze.distances.max())
            if self.spacing < longest:
                least = longest * (inner + 1) + 1
                raise ConfigError(
                    f"canvas: got {canvas}, expected at least {least}: two cells are {longest} steps apart"
                )

    @property
    def fingerprint(self) -> str:
        options = f"inner={self.inner} max_length={self.max_length} canvas={self.canvas}"
        digest = hashlib.sha256(repr(self.maze).encode()).hexdigest()[:16]
        return f"maze n={self.maze.n} {digest} {options}"

    @property
    def draws(self) -> int:
        return 1

    def batch(self, numbers: Tensor) -> dict[str, Tensor]:
        waypoints = self._waypoints(numbers)
        legs = self.maze.distances[waypoints[:, :-1], waypoints[:, 1:]].long()
        lengths = 1 + legs.sum(1)
        zero = torch.zeros(len(legs), 1, dtype=torch.int64)
        if self.canvas is None:
            places = torch.cat([zero, legs.cumsum(1)], dim=1)
            width = int(lengths.max()) if len(lengths) else 0
            ends = lengths
        else:
            width = self.canvas
            places = (torch.arange(self.inner + 2) * self.spacing).expand(len(legs), -1)
            places = torch.cat([places[:, :-1], zero + width - 1], dim=1)
            ends = zero[:, 0] + width
        ids = torch.full((len(legs), width), self.pad_id)
        self._walk(ids, waypoints, legs, places)
        fixed = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, places, True)
        column = torch.arange(width + 1)
        closed = (column == 0) | (column == ends[:, None])
        return {"input_ids": ids, "lengths": lengths, "waypoints": waypoints, "fixed": fixed, "closed": closed}

    def _waypoints(self, numbers: Tensor) -> Tensor:
        """Draw waypoints (rows, inner + 2) whose path is short enough."""
        cells, stops = self.maze.cells, self.inner + 2
        keys = numbers[:, 0].numpy().view(np.uint64)
        result = torch.zeros(len(keys), stops, dtype=torch.int64)
        pending = torch.arange(len(keys))
        for attempt in range(_ROUNDS):
            if not len(pending):
                return result
            bits = splitmix(keys[pending.numpy()], range(attempt * stops, (attempt + 1) * stops))
            away = 1 + torch.from_numpy((bits % np.uint64(cells - 1)).astype(np.int64))
            away[:, 0] = torch.from_numpy((bits[:, 0] % np.uint64(cells)).astype(np.int64))
            result[pending] = away.cumsum(1) % cells
            if self.max_length is not None:
                pending = pending[self.maze.shortest(result[pending]) > self.max_length]
            else:
                pending = pending[:0]
        raise ConfigError(f"max_length: got {self.max_length}, expected more: hardly any path is so short")

    def _walk(self, ids: Tensor, waypoints: Tensor, legs: Tensor, places: Tensor) -> None:
        """Write the waypoints at places (rows, stops), and the path from each to the next after it, into ids."""
        ids.scatter_(1, places, waypoints)
        start, cell = waypoints[:, :-1], waypoints[:, 1:]
        for steps in range(1, int(legs.max()) if legs.numel() else 0):  # from the goals back
            cell = self.maze.before[start, cell].long()
            row, leg = torch.nonzero(legs > steps, as_tuple=True)
            ids[row, places[row, leg] + legs[row, leg] - steps] = cell[row, leg]


def remove_pads(ids: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Move the pads in ids (batch, seq) behind all else, keeping the order; return ids and lengths (batch,).

    >>> remove_pads(torch.tensor([[3, 9, 4], [9, 9, 5]]), 9)[0].tolist()
    [[3, 4, 9], [5, 9, 9]]
    """
    pads = ids == pad_id
    return ids.gather(1, pads.byte().argsort(dim=1, stable=True)), (~pads).sum(1)
