from __future__ import annotations

from collections import deque
from itertools import pairwise

import pytest
import torch
from effml_diffusion.puzzles.maze import Maze
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st

# 0 - 1 - 2     a ring of eight cells, and the middle hanging from cell 1
# |   |   |
# 3   4   5
# |       |
# 6 - 7 - 8
RING = Maze(3, ((0, 1), (0, 3), (1, 2), (1, 4), (2, 5), (3, 6), (5, 8), (6, 7), (7, 8)))


def naive_path(maze: Maze, start: int, goal: int) -> list[int]:
    """Breadth-first search over whole paths, neighbours ascending."""
    queue, seen = deque([[start]]), {start}
    while queue:
        path = queue.popleft()
        if path[-1] == goal:
            return path
        for other in range(maze.cells):
            if other not in seen and (min(path[-1], other), max(path[-1], other)) in maze.passages:
                seen.add(other)
                queue.append([*path, other])
    raise AssertionError("not connected")


@settings(deadline=None, max_examples=15)
@given(st.integers(2, 5), st.sampled_from([0.0, 0.15, 1.0]), st.integers(0, 2**32))
def test_paths_are_those_of_a_plain_search(n: int, loops: float, seed: int) -> None:
    maze = Maze.random(n, loops=loops, seed=seed)
    for start in range(0, maze.cells, 3):
        for goal in range(maze.cells):
            path = naive_path(maze, start, goal)
            assert maze.path(start, goal) == path
            assert maze.distances[start, goal] == len(path) - 1
    assert torch.equal(maze.distances, maze.distances.T)


def test_the_lowest_neighbour_wins_among_equals() -> None:
    assert RING.path(0, 8) == [0, 1, 2, 5, 8]
    assert RING.path(8, 0) == [8, 5, 2, 1, 0]
    assert RING.path(6, 2) == [6, 3, 0, 1, 2]
    assert RING.through([4, 3, 4]) == [4, 1, 0, 3, 0, 1, 4]


@pytest.mark.parametrize("n", [2, 3, 8, 20])
def test_numbers_of_passages(n: int) -> None:
    """A perfect maze is a tree; loops open each of the other walls with the given probability."""
    perfect = Maze.random(n, loops=0.0)
    assert len(perfect.passages) == n * n - 1
    walls = 2 * n * (n - 1) - (n * n - 1)
    loose = sum(len(Maze.random(n, loops=0.15, seed=seed).passages) - (n * n - 1) for seed in range(10))
    assert abs(loose - 1.5 * walls) <= 4 * (1.5 * walls * 0.85) ** 0.5
    assert len(Maze.random(n, loops=1.0).passages) == 2 * n * (n - 1)
    assert Maze.random(n) == Maze.random(n) != Maze.random(n, seed=1)


def test_pixels_show_the_walls() -> None:
    rows = ["".join("#" if wall else "." for wall in row) for row in RING.pixels.tolist()]
    assert rows == ["#######", "#.....#", "#.#.#.#", "#.#.#.#", "#.###.#", "#.....#", "#######"]
    assert Maze.random(20).pixels.shape == (41, 41)


def check(maze: Maze, path: list[int], waypoints: list[int]) -> bool:
    """Ask for one path, with garbage behind its end."""
    ids = torch.tensor([[*path, 77, -5]])
    return bool(maze.solved(ids, torch.tensor([len(path)]), torch.tensor([waypoints])).item())


def test_success_is_strict() -> None:
    assert check(RING, [0, 1, 2], [0, 2])
    assert check(RING, [0, 1, 4, 1, 2], [0, 4, 2])
    assert check(RING, [0, 3, 6, 7, 8, 5, 2], [0, 2])  # not the shortest, yet a path
    assert check(RING, [0, 1, 0, 1], [0, 1])
    assert not check(RING, [0, 1, 2], [0, 4, 2])  # a waypoint is missing
    assert not check(RING, [4, 1, 2, 1, 0], [4, 0, 2, 0])  # comes to them in another order
    assert not check(RING, [0, 3, 4], [0, 4])  # through a wall
    assert not check(RING, [0, 2], [0, 2])  # a jump
    assert not check(RING, [0, 0, 1], [0, 1])  # a step that is none
    assert not check(RING, [1, 2], [0, 2])
    assert not check(RING, [0, 1], [0, 2])
    assert not check(RING, [], [0, 2])
    assert not check(RING, [0, 9, 2], [0, 2])  # a mask
    assert not check(RING, [0, -1, 2], [0, 2])
    assert check(RING, [0], [0])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 15), min_size=2, max_size=5))
def test_batches_are_judged_like_single_paths(seed: int, waypoints: list[int]) -> None:
    maze = Maze.random(4, loops=0.3, seed=seed)
    if any(a == b for a, b in pairwise(waypoints)):
        with pytest.raises(ConfigError, match=r"waypoints: got .*no two in a row equal"):
            maze.through(waypoints)
        return
    path = maze.through(waypoints)
    changed = [[*path[:at], (path[at] + 1) % 16, *path[at + 1 :]] for at in range(len(path))]
    rows = torch.tensor([path, *changed])
    lengths = torch.full((len(rows),), len(path))
    stops = torch.tensor([waypoints] * len(rows))
    found = maze.solved(rows, lengths, stops)
    assert found[0]
    assert found.tolist() == [naive_solved(maze, row, waypoints) for row in rows.tolist()]
    assert (maze.shortest(stops) == lengths).all()


def naive_solved(maze: Maze, path: list[int], waypoints: list[int]) -> bool:
    steps = {*maze.passages, *((b, a) for a, b in maze.passages)}
    cells = iter(path)
    in_order = all(any(cell == stop for cell in cells) for stop in waypoints)
    ends = path[0] == waypoints[0] and path[-1] == waypoints[-1]
    return in_order and ends and all(step in steps for step in pairwise(path))


def test_bad_input_is_refused() -> None:
    one = torch.ones(1, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"ids: got torch.float32"):
        RING.solved(torch.zeros(1, 3), one, one[None])
    with pytest.raises(ConfigError, match=r"lengths: got torch.int64 \(1, 1\), expected integers \(batch,\)"):
        RING.solved(one[None], one[None], one[None])
    with pytest.raises(ConfigError, match=r"waypoints: got none"):
        RING.solved(one[None], one, one[None, :0])
    assert RING.solved(one[None, :0], one * 0, one[None]).tolist() == [False]
    assert RING.solved(one[None], one * 2, one[None]).tolist() == [False]  # longer than what is there
    with pytest.raises(ConfigError, match=r"goal: got 9, expected a cell from 0 to 8"):
        RING.path(0, 9)
    with pytest.raises(ConfigError, match=r"start: got -1"):
        RING.through([-1, 2])
    with pytest.raises(ConfigError, match=r"waypoints: got \[3\]"):
        RING.through([3])
    for loops in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=r"loops: got"):
            Maze.random(3, loops=loops)
    with pytest.raises(ConfigError, match=r"n: got 1, expected an integer of at least 2"):
        Maze.random(1)
    with pytest.raises(ConfigError, match=r"passages: got \(0, 3\), expected pairs of neighbours"):
        Maze(2, ((0, 1), (0, 3)))
    with pytest.raises(ConfigError, match=r"passages: got cells that no path reaches"):
        Maze(2, ((0, 1), (2, 3)))
    with pytest.raises(ConfigError, match=r"passages: got repeated or unsorted"):
        Maze(2, ((0, 2), (0, 1), (1, 3)))
