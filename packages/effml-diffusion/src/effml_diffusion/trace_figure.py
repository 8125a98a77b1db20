"""Some frames of a generation side by side as a matplotlib figure, for reports and papers: what `trace_page` animates.

Colours are those of the page: blue what was revealed early, amber what was revealed late, grey what was given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from effml_shared.checks import check_range
from effml_shared.errors import ConfigError

from effml_diffusion.puzzles.maze import Maze
from effml_diffusion.puzzles.sudoku_tokens import SudokuTokens
from effml_diffusion.trace import Slot, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["trace_figure"]

Color = tuple[float, float, float]
Box = tuple[float, float]

_STOPS: tuple[Color, ...] = ((0.18, 0.33, 0.59), (0.25, 0.59, 0.59), (0.88, 0.64, 0.27))
_INK, _LINE, _GIVEN, _WRONG = "#1c2024", "#d8dde2", (0.90, 0.915, 0.93), "#b3261e"
_PER_LINE = 8  # tokens of a text per line
_TEXT_BOX = (4.0, 1.6)  # width and height


def trace_figure(
    trace: Trace,
    scene: SudokuTokens | Maze | None = None,
    *,
    steps: Sequence[int] | None = None,
    labels: Callable[[int], str] | None = None,
) -> Figure:
    """Return a figure with the row after some steps.

    Args:
        scene: the layout of a Sudoku, the maze that a path is in, or None for text.
        steps: one panel each, from 0, the start; None: start, middle and end.
        labels: what to show for a token of a Sudoku or a text; None: its number.

    Raises:
        ConfigError: there is no such step, or the row does not fit the Sudoku's layout.
    """
    from matplotlib.figure import Figure

    chosen = sorted({0, trace.steps // 2, trace.steps}) if steps is None else list(steps)
    for step in chosen:
        check_range("steps", step, 0, trace.steps + 1)
    if not chosen:
        raise ConfigError("steps: got none, expected at least one")
    frames = trace.frames()
    if isinstance(scene, SudokuTokens) and {len(row) for row in frames} != {scene.length}:
        raise ConfigError(f"trace: got rows of other lengths than {scene.length}, which this layout has")
    lines = -(-max(len(row) for row in frames) // _PER_LINE)
    height = 3.5 if scene else 0.6 + 3.2 * lines * _TEXT_BOX[1] / (_PER_LINE * _TEXT_BOX[0])
    figure = Figure(figsize=(3.2 * len(chosen), height), layout="constrained")
    panels: list[Axes] = list(figure.subplots(1, len(chosen), squeeze=False)[0])
    for axes, step in zip(panels, chosen, strict=True):
        axes.set_title(f"step {step} of {trace.steps}", fontsize=10, color=_INK)
        axes.axis("off")
        axes.set_aspect("equal")
        if isinstance(scene, Maze):
            _draw_path(axes, trace, frames[step], scene, finished=step == trace.steps)
        else:
            _draw_tokens(axes, trace, frames[step], scene, labels or str, lines)
    return figure


def _draw_tokens(
    axes: Axes,
    trace: Trace,
    row: list[Slot],
    tokens: SudokuTokens | None,
    label: Callable[[int], str],
    lines: int,
) -> None:
    """Draw a box per token, in the cells of a Sudoku or line by line."""
    from matplotlib.patches import Rectangle

    width, height = (1.0, 1.0) if tokens else _TEXT_BOX
    if tokens is None:
        places = [(i // _PER_LINE, i % _PER_LINE) for i in range(len(row))]
        across, down = _PER_LINE, lines
    else:
        places = [(r, c) for r, c, _ in tokens.places.tolist()]
        across = down = tokens.rules.n
    for slot, (line, column) in zip(row, places, strict=True):
        if column >= across:
            continue  # the end of a line
        x, y, masked = column * width, -line * height, slot.token == trace.mask_id
        face = (1.0, 1.0, 1.0) if masked else _pale(_color(slot, trace))
        axes.add_patch(Rectangle((x, y - height), width, height, facecolor=face, edgecolor=_LINE, linewidth=0.6))
        text = "·" if masked else label(slot.token).replace("$", r"\$").strip()[:8]
        weight = "bold" if _is_given(slot) and not masked else "normal"
        size = 90 / down if tokens else 5.5
        axes.text(
            x + width / 2, y - height / 2, text, ha="center", va="center", fontsize=size, weight=weight, color=_INK
        )
    if tokens:
        for i in range(across + 1):
            thick: dict[str, Any] = {"color": _INK, "linewidth": 1.4, "solid_capstyle": "projecting"}
            if i % tokens.rules.box_rows == 0:
                axes.plot([0, across], [-i, -i], **thick)
            if i % tokens.rules.box_columns == 0:
                axes.plot([i, i], [0, -down], **thick)
    axes.set_xlim(-0.1, across * width + 0.1)
    axes.set_ylim(-down * height - 0.1, 0.1)


def _draw_path(axes: Axes, trace: Trace, row: list[Slot], maze: Maze, *, finished: bool) -> None:
    """Draw the walls, what is known of the path, the waypoints, and in a finished path, dotted, impossible steps."""
    n, open_pairs = maze.n, set(maze.passages)
    walls: list[tuple[Box, Box]] = [((0, 0), (n, 0)), ((0, -n), (n, -n)), ((0, 0), (0, -n)), ((n, 0), (n, -n))]
    for cell in range(maze.cells):
        x, y = cell % n, -(cell // n)
        if x + 1 < n and (cell, cell + 1) not in open_pairs:
            walls.append(((x + 1, y), (x + 1, y - 1)))
        if cell + n < maze.cells and (cell, cell + n) not in open_pairs:
            walls.append(((x, y - 1), (x + 1, y - 1)))
    for (x1, y1), (x2, y2) in walls:
        axes.plot([x1, x2], [y1, y2], color=_INK, linewidth=1.1, solid_capstyle="projecting")
    inside = [0 <= slot.token < maze.cells and slot.token != trace.mask_id for slot in row]
    centre = [(slot.token % n + 0.5, -(slot.token // n) - 0.5) for slot in row]
    for i in range(len(row) - 1):
        if inside[i] and inside[i + 1]:
            a, b = row[i].token, row[i + 1].token
            line = [centre[i][0], centre[i + 1][0]], [centre[i][1], centre[i + 1][1]]
            if (min(a, b), max(a, b)) in open_pairs:
                later = row[i] if row[i].changed >= row[i + 1].changed else row[i + 1]
                axes.plot(*line, color=_color(later, trace), linewidth=3, solid_capstyle="round")
            elif finished:  # before, what lies between may still be inserted
                axes.plot(*line, color=_WRONG, linewidth=1.2, linestyle=":")
    for slot, place, there in zip(row, centre, inside, strict=True):
        if there and _is_given(slot):
            axes.plot(*place, "o", markersize=7, markerfacecolor="white", markeredgecolor=_INK, zorder=3)
        elif there:
            axes.plot(*place, "o", markersize=3.5, color=_color(slot, trace))
    axes.set_xlim(-0.1, n + 0.1)
    axes.set_ylim(-n - 0.1, 0.1)


def _is_given(slot: Slot) -> bool:
    return slot.born < 0 and slot.changed < 0


def _color(slot: Slot, trace: Trace) -> Color:
    if _is_given(slot):
        return _GIVEN
    at = 2 * max(slot.changed, 0) / max(trace.steps - 1, 1)
    i = min(int(at), 1)
    red, green, blue = (a + (b - a) * (at - i) for a, b in zip(_STOPS[i], _STOPS[i + 1], strict=True))
    return red, green, blue


def _pale(color: Color) -> Color:
    if color == _GIVEN:
        return color
    red, green, blue = (1 - 0.4 * (1 - part) for part in color)
    return red, green, blue
