from __future__ import annotations

import itertools
from random import Random
from typing import Any

import numpy as np
import pytest
from effml_diffusion.puzzles.sudoku_search import Units, dig, exchange, fill, search, solve_by_singles
from hypothesis import given, settings
from hypothesis import strategies as st


def units_of(box_rows: int, box_columns: int) -> Units:
    n = box_rows * box_columns
    box = [(r // box_rows) * box_rows + c // box_columns for r in range(n) for c in range(n)]
    return [(cell // n, n + cell % n, 2 * n + box[cell]) for cell in range(n * n)]


SMALL, MIDDLE = units_of(2, 2), units_of(2, 3)


def is_valid(units: Units, grid: list[int]) -> bool:
    n = round(len(grid) ** 0.5)
    held = [{grid[cell] for cell in range(len(grid)) if unit in units[cell]} for unit in range(3 * n)]
    return all(values == set(range(1, n + 1)) for values in held)


@pytest.fixture(scope="module")
def every_grid() -> list[list[int]]:
    """All 4x4 grids, from all combinations of four rows."""
    rows = list(itertools.permutations(range(1, 5)))
    grids = ([*a, *b, *c, *d] for a, b, c, d in itertools.product(rows, repeat=4) if not any(map(int.__eq__, a, b)))
    return [grid for grid in grids if is_valid(SMALL, grid)]


def test_search_finds_every_grid(every_grid: list[list[int]]) -> None:
    assert len(every_grid) == 288
    found = search(SMALL, [0] * 16, limit=1000)
    assert sorted(found.solutions) == sorted(every_grid)
    assert found.finished


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 287), st.sets(st.integers(0, 15)), st.integers(0, 15), st.integers(1, 4))
def test_search_counts_what_enumeration_counts(
    every_grid: list[list[int]], index: int, kept: set[int], cell: int, value: int
) -> None:
    puzzle = [v if c in kept else 0 for c, v in enumerate(every_grid[index])]
    puzzle[cell] = value  # which may leave no solution, or break the rules at once
    expected = sum(all(a in (0, b) for a, b in zip(puzzle, grid, strict=True)) for grid in every_grid)
    assert len(search(SMALL, puzzle, limit=1000).solutions) == expected
    assert len(search(SMALL, puzzle, limit=2).solutions) == min(expected, 2)
    assert puzzle[cell] == value


def test_search_gives_up_at_its_budget() -> None:
    found = search(MIDDLE, [0] * 36, limit=10**9, budget=50)
    assert not found.finished
    assert found.guesses == 51
    assert all(is_valid(MIDDLE, grid) for grid in found.solutions)


@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 2), (3, 2), (2, 3), (3, 3), (4, 4)])
def test_random_grids_are_valid(shape: tuple[int, int]) -> None:
    units = units_of(*shape)
    assert all(is_valid(units, fill(units, Random(seed))) for seed in range(3))


class Scripted:
    """A generator that makes one given choice of two digits and of a cell."""

    def __init__(self, pair: tuple[int, int], place: int) -> None:
        self.pair, self.place = pair, place

    def sample(self, population: Any, k: int) -> list[int]:
        return list(self.pair)

    def choice(self, cells: list[int]) -> int:
        return cells[self.place]


def test_exchanges_make_all_grids_equally_likely(every_grid: list[list[int]]) -> None:
    """The exact chain on all 4x4 grids is symmetric, and nearly uniform after 2 n steps from the worst start."""
    number = {tuple(grid): i for i, grid in enumerate(every_grid)}
    step = np.zeros((288, 288))
    for i, grid in enumerate(every_grid):
        for pair in itertools.combinations(range(1, 5), 2):
            for place in range(8):
                rng: Any = Scripted(pair, place)
                step[i, number[tuple(exchange(SMALL, grid, 1, rng))]] += 1 / 48
    assert np.array_equal(step, step.T)
    assert np.allclose(step.sum(1), 1)
    distance = np.abs(np.linalg.matrix_power(step, 8) - 1 / 288).sum(1) / 2
    assert distance.max() < 0.25
    assert np.abs(np.linalg.matrix_power(step, 256) - 1 / 288).max() < 1e-12  # no grid is out of reach


def test_random_grids_are_all_but_equally_likely(every_grid: list[list[int]]) -> None:
    """96 grids have more symmetries than the other 192; without exchanges they would come half of the time."""
    corners = {tuple(grid): _chains(grid) for grid in every_grid}
    kinds = sorted(set(corners.values()))
    expected = sum(kind == kinds[0] for kind in corners.values()) / 288
    draws = 4000
    seen = sum(corners[tuple(fill(SMALL, Random(seed)))] == kinds[0] for seed in range(draws)) / draws
    assert abs(seen - expected) < 4 * (expected * (1 - expected) / draws) ** 0.5


def _chains(grid: list[int]) -> int:
    """Return the number of parts in which digits can be exchanged, over all pairs: the same for symmetric grids."""
    parts = set()
    for pair in itertools.combinations(range(1, 5), 2):
        for place in range(8):
            rng: Any = Scripted(pair, place)
            changed = exchange(SMALL, grid, 1, rng)
            parts.add((pair, tuple(a == b for a, b in zip(grid, changed, strict=True))))
    return len(parts)


@pytest.mark.parametrize(("units", "clues"), [(SMALL, 5), (SMALL, 4), (MIDDLE, 12), (MIDDLE, 36)])
def test_dug_puzzles_are_unique(units: Units, clues: int) -> None:
    made = 0
    for seed in range(20):
        grid = fill(units, Random(seed))
        puzzle = dig(units, grid, clues, Random(seed))
        if puzzle is not None:
            made += 1
            assert sum(map(bool, puzzle)) == clues
            assert search(units, puzzle, limit=2).solutions == [grid]
    assert made


def test_digging_on_is_impossible_only_when_every_removal_would_be_ambiguous() -> None:
    """What remains when as much as possible is removed has no clue to spare."""
    grid = fill(MIDDLE, Random(0))
    assert dig(MIDDLE, grid, 0, Random(1)) is None
    least = next(clues for clues in range(36) if dig(MIDDLE, grid, clues, Random(1)))
    puzzle = dig(MIDDLE, grid, least, Random(1))
    assert puzzle is not None
    for cell in (cell for cell, value in enumerate(puzzle) if value):
        assert len(search(MIDDLE, [0 if c == cell else v for c, v in enumerate(puzzle)], limit=2).solutions) == 2


def test_singles_never_guess() -> None:
    grid = fill(MIDDLE, Random(3))
    for seed in range(10):
        puzzle = dig(MIDDLE, grid, 12, Random(seed)) or grid
        for hidden in (False, True):
            reached = solve_by_singles(MIDDLE, puzzle, hidden=hidden)
            assert all(value in (0, truth) for value, truth in zip(reached, grid, strict=True))
        naked = all(solve_by_singles(MIDDLE, puzzle, hidden=False))
        assert naked == (search(MIDDLE, puzzle, limit=2).guesses == 0)
        assert all(solve_by_singles(MIDDLE, puzzle)) or not naked


def test_a_hidden_single_is_seen() -> None:
    """The 1 of the first box of a 4x4 has one place left, which has other digits left as well."""
    puzzle = [0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert solve_by_singles(SMALL, puzzle, hidden=False)[0] == 0
    assert solve_by_singles(SMALL, puzzle)[0] == 1


def test_singles_end_at_a_contradiction() -> None:
    assert solve_by_singles(SMALL, [1, 1] + [0] * 14) == [1, 1] + [0] * 14
    solve_by_singles(SMALL, [1, 2, 3, 0] + [0] * 3 + [4] + [0] * 8)  # no digit for one cell
