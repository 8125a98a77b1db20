from __future__ import annotations

import io

import pytest
import torch
from effml_diffusion.puzzles.maze import Maze
from effml_diffusion.puzzles.sudoku import Sudoku
from effml_diffusion.puzzles.sudoku_tokens import SudokuTokens
from effml_diffusion.trace import Trace
from effml_diffusion.trace_figure import trace_figure
from effml_shared.errors import ConfigError


def texts(trace: Trace, *arguments: object, **options: object) -> list[list[str]]:
    """Draw a figure and return what is written in each of its panels."""
    figure = trace_figure(trace, *arguments, **options)  # type: ignore[arg-type]
    figure.savefig(io.BytesIO(), format="svg")
    return [[text.get_text() for text in axes.texts] for axes in figure.axes]


def test_panels_show_the_grid_at_start_middle_and_end() -> None:
    tokens = SudokuTokens(Sudoku(1, 2), lines=True)
    ids = torch.tensor([[1, 0, 3, 0, 0], [1, 2, 3, 0, 0], [1, 2, 3, 2, 1]])
    assert texts(Trace.from_snapshots(ids, 0), tokens) == [
        ["1", "·", "·", "·"],
        ["1", "2", "·", "·"],
        ["1", "2", "2", "1"],
    ]


def test_text_is_drawn_as_it_is() -> None:
    trace = Trace.from_snapshots(torch.tensor([[0, 0], [1, 0], [1, 2]]), 0)
    assert texts(trace, labels=lambda token: f"$x_{token}$", steps=[2]) == [["\\$x_1\\$", "\\$x_2\\$"]]


def test_paths_are_drawn_in_their_maze() -> None:
    maze = Maze.random(4, loops=0.0)
    path = maze.path(0, 15)
    events = [(0, "insert", 0, i, 16) for i in range(1, len(path) - 1)]
    events += [(1, "reveal", 0, i, path[i]) for i in range(1, len(path) - 1)]
    trace = Trace.from_flex(events, 16, start=[0, 15])
    figure = trace_figure(trace, maze, steps=[0, 1, 2])
    figure.savefig(io.BytesIO(), format="svg")
    walls = len(figure.axes[0].lines) - 2  # two waypoints
    assert walls == 4 + 24 - 15
    assert len(figure.axes[2].lines) == walls + len(path) + len(path) - 1
    assert len(trace_figure(Trace((0, 15), (), 0, 16), maze).axes[0].lines) == walls + 3  # with an impossible step


def test_bad_requests() -> None:
    trace = Trace.from_snapshots(torch.zeros(3, 4, dtype=torch.long), 0)
    with pytest.raises(ConfigError, match=r"steps: got 3, expected a number in \[0, 3\)"):
        trace_figure(trace, steps=[3])
    with pytest.raises(ConfigError, match=r"steps: got none"):
        trace_figure(trace, steps=[])
    with pytest.raises(ConfigError, match=r"trace: got rows of other lengths than 16"):
        trace_figure(trace, SudokuTokens(Sudoku(2, 2)))


def test_an_empty_text() -> None:
    assert texts(Trace.from_flex([], 9)) == [[]]
