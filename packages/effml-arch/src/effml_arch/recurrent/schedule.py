"""In which order the pairs of a recurrent attention layer are computed: exact coverings of the strict lower triangle.

Position t may read the persistent key of position i < t only after i is finished. A tile merges a range of finished
keys into a range of later queries at once, and both schedules below cover every pair (query, key < query) that lies in
two different blocks of `base` positions exactly once, and before its query is finished. A tile is run when all
positions before its first query are finished; the same tiles in reverse order make the backward pass exact, since all
queries that read a key are done when the key's own position is reached. Pairs within a block are left to the caller.

    tile: at c, a multiple of the base block, the side is T = base lowbit(c / base): keys [c - T, c) into [c, c + T).
    pull: at c, the keys of all earlier blocks into the block that begins at c.

Key rows read for N positions and base block 1: (N / 2) log2 N for N a power of two with tiles, against N (N - 1) / 2
with pulls, which have few large products instead and suit caches that hold all keys. Queries must be known up front.
Sources: the Recurrent Transformer, arXiv 2604.21215, section 5; relaxed tiling, arXiv 2410.12982. That every pair is
covered once is proved here as follows: for i < j let c be the number in (i, j] with the largest lowbit T; another
number in (c - T, c + T) has a smaller one, so that its tile lies to one side of c and holds at most one of i and j.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from effml_shared.checks import check_choice, check_count

__all__ = ["SCHEDULES", "Tile", "pull_schedule", "schedule", "tile_schedule"]

SCHEDULES = ("tile", "pull")


class Tile(NamedTuple):
    """Keys [k0, k1) go into queries [q0, q1); k1 = q0, the first moment at which they all exist."""

    q0: int
    q1: int
    k0: int
    k1: int


def tile_schedule(n: int, base: int = 1) -> Iterator[Tile]:
    """Yield power-of-two tiles for n positions in blocks of `base`, in order of their first query.

    >>> [tuple(tile) for tile in tile_schedule(5)]
    [(1, 2, 0, 1), (2, 4, 0, 2), (3, 4, 2, 3), (4, 5, 0, 4)]
    """
    for c in range(base, n, base):
        block = c // base
        side = base * (block & -block)
        yield Tile(c, min(c + side, n), c - side, c)


def pull_schedule(n: int, base: int = 1) -> Iterator[Tile]:
    """Yield for each block of `base` positions but the first the tile of all keys before it.

    >>> [tuple(tile) for tile in pull_schedule(5, base=2)]
    [(2, 4, 0, 2), (4, 5, 0, 4)]
    """
    for c in range(base, n, base):
        yield Tile(c, min(c + base, n), 0, c)


def schedule(kind: str, n: int, base: int) -> dict[int, Tile]:
    """Return the tiles of a schedule, `"tile"` or `"pull"`, by their first query.

    Raises:
        ConfigError: the kind is unknown, or n or base is not an integer of at least 1.
    """
    check_choice("schedule", kind, SCHEDULES)
    check_count("n", n, 1)
    check_count("base", base, 1)
    return {tile.q0: tile for tile in (tile_schedule if kind == "tile" else pull_schedule)(n, base)}
