from __future__ import annotations

import pytest
import torch
from effml_diffusion.puzzles.maze import Maze
from effml_diffusion.puzzles.maze_paths import MazePaths, remove_pads
from effml_diffusion.puzzles.sample_stream import SampleStream
from effml_shared.errors import ConfigError

MAZE = Maze.random(5, loops=0.15, seed=2)


@pytest.mark.parametrize("inner", [0, 2, 5])
def test_samples_are_the_paths_through_their_waypoints(inner: int) -> None:
    paths = MazePaths(MAZE, inner)
    batch = SampleStream(paths).next(200)
    assert batch["waypoints"].shape == (200, inner + 2)
    for row in range(200):
        path = MAZE.through(batch["waypoints"][row].tolist())
        assert batch["lengths"][row] == len(path)
        ids = batch["input_ids"][row].tolist()
        assert ids == path + [paths.pad_id] * (len(ids) - len(path))
    assert MAZE.solved(batch["input_ids"], batch["lengths"], batch["waypoints"]).all()


def test_what_is_given_and_where_nothing_may_be_inserted() -> None:
    batch = SampleStream(MazePaths(MAZE, 2)).next(100)
    assert (batch["fixed"].sum(1) == 4).all()
    assert torch.equal(batch["input_ids"][batch["fixed"]].view(100, 4), batch["waypoints"])
    column = torch.arange(batch["closed"].shape[1])
    assert torch.equal(batch["closed"], (column == 0) | (column == batch["lengths"][:, None]))


def test_waypoints_are_uniform() -> None:
    waypoints = SampleStream(MazePaths(MAZE, 1)).next(20000)["waypoints"]
    assert (waypoints[:, :-1] != waypoints[:, 1:]).all()
    for stop in range(3):
        counts = torch.bincount(waypoints[:, stop], minlength=25).double()
        chi_square = ((counts - 800) ** 2 / 800).sum().item()
        assert abs(chi_square - 24) < 4 * 48**0.5


def test_long_samples_are_drawn_again() -> None:
    batch = SampleStream(MazePaths(MAZE, 2, max_length=12)).next(300)
    assert batch["lengths"].max() <= 12
    free = SampleStream(MazePaths(MAZE, 2)).next(300)
    short = free["lengths"] <= 12
    assert torch.equal(batch["waypoints"][short], free["waypoints"][short])
    assert len(batch["waypoints"].unique(dim=0)) > 250


def test_samples_do_not_depend_on_their_batch() -> None:
    whole = SampleStream(MazePaths(MAZE, 2, max_length=15)).next(30)["waypoints"]
    parts = SampleStream(MazePaths(MAZE, 2, max_length=15))
    assert torch.equal(torch.cat([parts.next(size)["waypoints"] for size in (3, 20, 7)]), whole)


def test_a_canvas_holds_the_same_paths_at_equal_distances() -> None:
    longest = int(MAZE.distances.max())
    for canvas in (3 * longest + 1, 3 * longest + 6):
        paths = MazePaths(MAZE, 2, canvas=canvas)
        plain, laid = SampleStream(MazePaths(MAZE, 2)).next(200), SampleStream(paths).next(200)
        assert laid["input_ids"].shape == (200, canvas)
        ids, lengths = remove_pads(laid["input_ids"], paths.pad_id)
        assert torch.equal(lengths, plain["lengths"])
        assert torch.equal(ids[:, : plain["input_ids"].shape[1]], plain["input_ids"])
        places = [0, (canvas - 1) // 3, 2 * ((canvas - 1) // 3), canvas - 1]
        assert (laid["fixed"].nonzero()[:, 1].view(200, 4) == torch.tensor(places)).all()
        assert torch.equal(laid["input_ids"][:, places], laid["waypoints"])
        assert (laid["closed"].nonzero()[:, 1].view(200, 2) == torch.tensor([0, canvas])).all()


def test_an_empty_part_of_a_batch() -> None:
    batch = SampleStream(MazePaths(MAZE, 2), rank=0, world_size=3).next(1)
    assert batch["input_ids"].shape[0] == batch["fixed"].shape[0] == 0


def test_impossible_requests() -> None:
    with pytest.raises(ConfigError, match=r"canvas: got 10, expected at least \d+: two cells are \d+ steps apart"):
        MazePaths(MAZE, 2, canvas=10)
    with pytest.raises(ConfigError, match=r"max_length: got 3, expected an integer of at least 4"):
        MazePaths(MAZE, 2, max_length=3)
    with pytest.raises(ConfigError, match=r"max_length: got 32, expected more: hardly any path is so short"):
        SampleStream(MazePaths(Maze.random(12), 30, max_length=32)).next(1)
    with pytest.raises(ConfigError, match=r"inner: got -1"):
        MazePaths(MAZE, -1)
    assert MazePaths(MAZE, 2).fingerprint != MazePaths(Maze.random(5, seed=1), 2).fingerprint
