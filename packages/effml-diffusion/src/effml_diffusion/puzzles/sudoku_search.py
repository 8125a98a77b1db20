"""Solve, count, grade and dig Sudoku puzzles: plain Python on integers used as sets of digits.

A grid is a list of values, 0 for an empty cell; a cell's units are its row, its column and its box, numbered through.
Bit v - 1 of a set stands for the digit v. `search` tries the cell with the fewest candidates first; it looks for no
hidden singles, which finds a contradiction later but a candidate set sooner, and is faster in Python.

Digging removes clues in random order as long as the solution stays unique. That holds after a removal if and only if no
solution has another digit in that very cell, so only those digits are tried, and none where the units leave no other.

A search that goes down at random prefers grids with few alternatives. Random exchanges of two digits, along the chains
of cells that force each other, lead from any grid to its neighbours and back with equal probability. All grids being
equally likely is then stationary, so every exchange brings the law of a grid closer to that, or leaves it.

Cost: microseconds per cell without guesses; the number of guesses has a heavy tail, which `budget` cuts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random
from typing import NamedTuple

__all__ = ["Completions", "Units", "dig", "exchange", "fill", "search", "solve_by_singles"]

Units = Sequence[tuple[int, int, int]]
"""Of every cell: the numbers of its row, column and box, all below 3 n."""


class Completions(NamedTuple):
    """What a search found."""

    solutions: list[list[int]]
    guesses: int  # digits tried in cells that had several candidates
    finished: bool  # False: the budget ended it


def search(
    units: Units, values: Sequence[int], *, limit: int = 1, rng: Random | None = None, budget: int | None = None
) -> Completions:
    """Return up to `limit` grids that complete `values`.

    Args:
        rng: tries digits in random order; None: in ascending order.
        budget: give up after so many guesses; None: never.
    """
    grid, size = list(values), _size(units)
    free = _free(units, grid)
    if free is None:
        return Completions([], 0, True)
    empty = [cell for cell, value in enumerate(grid) if not value]
    solutions: list[list[int]] = []
    guesses = 0

    def descend(left: int) -> bool:
        """Fill empty[:left] in all ways; return whether to stop altogether."""
        nonlocal guesses
        if not left:
            solutions.append(grid.copy())
            return len(solutions) >= limit
        fewest, place, options = size + 1, 0, 0
        for i in range(left):
            row, column, box = units[empty[i]]
            candidates = free[row] & free[column] & free[box]
            count = candidates.bit_count()
            if count < fewest:
                fewest, place, options = count, i, candidates
                if count < 2:
                    break
        last = left - 1
        cell = empty[place]
        row, column, box = units[cell]
        empty[place], empty[last] = empty[last], cell
        digits = list(_digits(options))
        if rng is not None:
            rng.shuffle(digits)
        for value in digits:
            if fewest > 1:
                guesses += 1
                if budget is not None and guesses > budget:
                    return True
            bit = 1 << value - 1
            free[row] ^= bit
            free[column] ^= bit
            free[box] ^= bit
            grid[cell] = value
            if descend(last):
                return True
            free[row] ^= bit
            free[column] ^= bit
            free[box] ^= bit
        grid[cell] = 0
        empty[last], empty[place] = empty[place], cell
        return False

    descend(len(empty))
    return Completions(solutions, guesses, budget is None or guesses <= budget)


def fill(units: Units, rng: Random) -> list[int]:
    """Return a random full grid, after 2 n exchanges all but equally likely to be any."""
    while True:  # a dive that went wrong early is cheaper to begin again than to finish
        found = search(units, [0] * len(units), rng=rng, budget=4 * len(units)).solutions
        if found:
            return exchange(units, found[0], 2 * _size(units), rng)


def exchange(units: Units, grid: Sequence[int], times: int, rng: Random) -> list[int]:
    """Return a full grid changed `times` times by exchanging two random digits in a part of the grid.

    The part is all that is reached from a random cell with one of the digits through common units; every unit has both
    of them in it or neither, so the grid stays valid.
    """
    grid = list(grid)
    for _ in range(times):
        pair = rng.sample(range(1, _size(units) + 1), 2) if _size(units) > 1 else [1, 1]
        cells = [cell for cell, value in enumerate(grid) if value in pair]
        holders: dict[int, list[int]] = {}
        for cell in cells:
            for unit in units[cell]:
                holders.setdefault(unit, []).append(cell)
        reached = {rng.choice(cells)}
        frontier = list(reached)
        while frontier:
            near = {other for unit in units[frontier.pop()] for other in holders[unit]} - reached
            reached |= near
            frontier += near
        for cell in reached:
            grid[cell] = sum(pair) - grid[cell]
    return grid


def dig(units: Units, grid: Sequence[int], clues: int, rng: Random) -> list[int] | None:
    """Remove cells of a full grid, in random order, until `clues` remain; None if this order leads to no such puzzle.

    The grid is the only solution of the puzzle.
    """
    puzzle = list(grid)
    free = [0] * (3 * _size(units))
    order = list(range(len(puzzle)))
    rng.shuffle(order)
    remaining = len(puzzle)
    for cell in order:
        if remaining == clues:
            break
        row, column, box = units[cell]
        value, bit = puzzle[cell], 1 << puzzle[cell] - 1
        puzzle[cell] = 0
        if any(_solvable_with(units, puzzle, cell, other) for other in _digits(free[row] & free[column] & free[box])):
            puzzle[cell] = value
            continue
        free[row] |= bit
        free[column] |= bit
        free[box] |= bit
        remaining -= 1
    return puzzle if remaining == clues else None


def solve_by_singles(units: Units, values: Sequence[int], *, hidden: bool = True) -> list[int]:
    """Fill in every cell that follows at sight, as long as there is one, and return the grid, full or not.

    A naked single is the only digit left for a cell; a hidden single, the only cell left for a digit in a row, column
    or box. A contradiction ends it as well.
    """
    grid = list(values)
    free = _free(units, grid)
    members = _members(units)
    progress = free is not None
    while free is not None and progress:
        candidates = [
            0 if value else free[row] & free[column] & free[box]
            for value, (row, column, box) in zip(grid, units, strict=True)
        ]
        certain = {cell: found for cell, found in enumerate(candidates) if found.bit_count() == 1}
        for cells in members if hidden and not certain else ():
            once = twice = 0
            for cell in cells:
                twice |= once & candidates[cell]
                once |= candidates[cell]
            only = once & ~twice
            certain |= {cell: candidates[cell] & only for cell in cells if candidates[cell] & only}
        progress = bool(certain)
        for cell, found in certain.items():
            grid[cell] = found.bit_length()
        free = _free(units, grid)
    return grid


def _solvable_with(units: Units, puzzle: list[int], cell: int, value: int) -> bool:
    puzzle[cell] = value
    found = search(units, puzzle).solutions
    puzzle[cell] = 0
    return bool(found)


def _free(units: Units, values: Sequence[int]) -> list[int] | None:
    """Return the digits that are missing in each unit, None if one occurs twice in a unit."""
    free = [(1 << _size(units)) - 1] * (3 * _size(units))
    for cell, value in enumerate(values):
        if value:
            bit = 1 << value - 1
            for unit in units[cell]:
                if not free[unit] & bit:
                    return None
                free[unit] ^= bit
    return free


def _members(units: Units) -> list[list[int]]:
    """Return the cells of each unit."""
    members: list[list[int]] = [[] for _ in range(3 * _size(units))]
    for cell, own in enumerate(units):
        for unit in own:
            members[unit].append(cell)
    return members


def _digits(options: int) -> Iterator[int]:
    while options:
        yield (options & -options).bit_length()
        options &= options - 1


def _size(units: Units) -> int:
    return units[-1][0] + 1  # the last cell is in the last row
