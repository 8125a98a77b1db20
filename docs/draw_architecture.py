"""Draw docs/architecture.svg from the imports in the sources: `python docs/draw_architecture.py`.

Every package is a house, every Python file a window, the core the ground that all houses stand on, floor below floor.
The pillar under a house shows how many of its files import from each floor; no line leads from house to house.
"""

from __future__ import annotations

import html
import math
from pathlib import Path

from import_graph import CORE, ImportGraph

PICTURE = Path(__file__).with_name("architecture.svg")
HOUSES = {  # in the order of the street: what it is about, its colour, its colour diluted
    "effml_optim": ("optimizers", "#b4601a", "#f7e6d4"),
    "effml_quant": ("low precision", "#a83258", "#f7dde5"),
    "effml_arch": ("architectures", "#4f7a28", "#e4eed8"),
    "effml_diffusion": ("masked diffusion", "#1d7a78", "#d7ecea"),
    "effml_rl": ("RL with verifiers", "#6c4fa8", "#e6dff3"),
    "effml_eval": ("evaluation", "#2063a8", "#dae7f5"),
}
PAPER, INK, SOFT, SLATE, PALE, WINDOW = "#fcfbf8", "#22262b", "#646b74", "#39424e", "#cfd6de", "#8b95a3"

WIDTH, MARGIN = 1186, 26
STREET, LOT = 430, 122  # where the houses begin; room for each
SIDE, PER_ROW, PITCH, PANE = 106, 8, 12, 8  # of a house; windows in a row, their distance and size
NAME, ROW, LINE = 58, 26, 15  # left edge of module names; height of a floor, and of another line of names
PLATE, HEADER, STORY = 44, 40, 338  # heights of a house's name, of the core's, of the text above the core
ATTIC = PER_ROW - 2  # windows in a row of an attic, where the experiments are
LONGEST = 33  # characters of module names in a line


def draw(graph: ImportGraph) -> str:
    """Return the picture as SVG."""
    rooms = {name: _rooms(graph, name) for name in HOUSES}
    ground = max(STORY, 40 + max(_height(len(a)) + _height(len(b), ATTIC) for a, b in rooms.values()) + PLATE)
    floors = [(number, names, _lines(names)) for number, names in enumerate(graph.floors)][::-1]
    bottom = ground + HEADER + sum(_thickness(lines) for *_, lines in floors)
    height = bottom + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'role="img" font-family="system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif">',
        "<title>Six packages that never touch, on one thin core</title>",
        f"<desc>{html.escape(_description(graph, rooms))}</desc>",
        _box(0.5, 0.5, WIDTH - 1, height - 1, PAPER, radius=14, line="#d8d4cb"),
        *_story(graph),
        *_ground(graph, ground, floors),
    ]
    for place, (name, files) in enumerate(rooms.items()):
        middle = STREET + LOT * place + LOT / 2
        parts += _pillars(graph, name, middle, ground, floors)
        parts += _house(name, middle, ground, files)
    return "\n".join([*parts, "</svg>", ""])


def _rooms(graph: ImportGraph, package: str) -> tuple[list[str], list[str]]:
    return graph.files(package, experiments=False), graph.files(package, experiments=True)


def _story(graph: ImportGraph) -> list[str]:
    """Say at the left, above the floors, what is to be seen."""
    parts = [
        _text(MARGIN, 54, "Six packages that never touch,", 25, weight=700),
        _text(MARGIN, 86, "on one thin core.", 25, weight=700),
        _text(MARGIN, 116, "Drawn from the imports in the sources:", 14, SOFT),
    ]
    y = 148
    for wall, count in graph.crossings().items():
        colour = "#b3261e" if count else "#14713d"
        parts += [
            _text(MARGIN + 12, y, str(count), 20, colour, weight=700, anchor="middle"),
            _text(MARGIN + 32, y - 1, f"imports {wall}", 14),
        ]
        y += 27
    y += 10
    return [
        *parts,
        _box(MARGIN + 8, y - 8, PANE, PANE, SOFT),
        _text(MARGIN + 32, y, "a Python file", 13, SOFT),
        _box(MARGIN + 140.5, y - 7.5, PANE - 1, PANE - 1, "none", line=SOFT),
        _text(MARGIN + 158, y, "a file of experiments", 13, SOFT),
        _dot(MARGIN + 12, y + 21, 8, "n", SOFT, hollow=False),
        _text(MARGIN + 32, y + 25, "n files of the package import from this floor", 13, SOFT),
    ]


def _house(name: str, middle: float, ground: float, files: tuple[list[str], list[str]]) -> list[str]:
    topic, colour, pale = HOUSES[name]
    left = middle - SIDE / 2
    library, experiments = map(len, files)
    wall = ground - PLATE - _height(library)
    attic = wall - _height(experiments, ATTIC)
    return [
        _box(left + 9, attic, SIDE - 18, _height(experiments, ATTIC) + 6, PAPER, radius=6, line=colour),
        *_windows(middle, attic, experiments, ATTIC, colour, hollow=True),
        _box(left, wall, SIDE, _height(library) + PLATE, pale, radius=4, line=colour),
        *_windows(middle, wall, library, PER_ROW, colour, hollow=False),
        _box(left, ground - PLATE, SIDE, PLATE, colour, line=colour),
        _text(middle, ground - PLATE + 18, name.replace("_", "-"), 12, "#ffffff", weight=700, anchor="middle"),
        _text(middle, ground - PLATE + 34, topic, 10.5, "#ffffff", anchor="middle"),
    ]


def _windows(middle: float, top: float, count: int, per_row: int, colour: str, *, hollow: bool) -> list[str]:
    """Draw one window per file, as one path: rows from below, so that a short one is at the top."""
    left = middle - (per_row * PITCH - (PITCH - PANE)) / 2
    last = top + _height(count, per_row) - PITCH - 1
    shrink = 0.5 if hollow else 0  # a line is drawn on both sides of its path
    squares = []
    for index in range(count):
        row, column = divmod(index, per_row)
        x, y, side = left + column * PITCH + shrink, last - row * PITCH + shrink, PANE - 2 * shrink
        squares.append(f"M{x:g} {y:g}h{side:g}v{side:g}h-{side:g}z")
    paint = f'fill="none" stroke="{colour}"' if hollow else f'fill="{colour}"'
    return [f'<path d="{"".join(squares)}" {paint}/>']


def _ground(graph: ImportGraph, top: float, floors: list[tuple[int, list[str], list[str]]]) -> list[str]:
    """Draw the core: its name, then floor below floor with their modules and a window per file."""
    files = [module for module in graph.sources.modules(CORE) if graph.floor_of(module) >= 0]
    wide = WIDTH - 2 * MARGIN + 20
    left = MARGIN - 10
    words = f"the core: {len(floors)} floors, {len(files)} files"
    parts = [
        _box(left, top, wide, HEADER, SLATE, radius=5),
        _text(MARGIN + 6, top + 25, "effml-shared", 15, "#ffffff", weight=700),
        _text(MARGIN + 130, top + 25, words, 13, PALE),
    ]
    y = top + HEADER
    for number, _, lines in floors:
        high = _thickness(lines)
        parts.append(_box(left, y, wide, high, "#eceff2" if number % 2 else "#e1e5ea"))
        parts.append(_text(MARGIN + 18, y + 18, str(number), 12, SOFT, anchor="end"))
        for place, line in enumerate(lines):
            parts.append(_text(NAME, y + 18 + LINE * place, line, 13, INK, weight=500))
        count = sum(graph.floor_of(module) == number for module in files)
        parts += _core_windows(y, count)
        y += high
    return parts


def _core_windows(y: float, count: int) -> list[str]:
    per_row = 8
    squares = []
    for index in range(count):
        row, column = divmod(index, per_row)
        squares.append(f"M{STREET - 16 - PITCH * (column + 1)} {y + 9 - (4 if count > per_row else 0) + PITCH * row:g}")
        squares.append(f"h{PANE}v{PANE}h-{PANE}z")
    return [f'<path d="{"".join(squares)}" fill="{WINDOW}"/>']


def _pillars(
    graph: ImportGraph, name: str, middle: float, ground: float, floors: list[tuple[int, list[str], list[str]]]
) -> list[str]:
    """Draw under a house what its library (left) and its experiments (right) take from each floor."""
    colour = HOUSES[name][1]
    lines, dots = [], []
    for x, experiments in ((middle - 33, False), (middle + 20, True)):
        taken = graph.taken(name, experiments=experiments)
        word = "experiments" if experiments else "library"
        dots.append(_text(x, ground + 24, word, 10.5, PALE, anchor="middle"))
        y, deepest = ground + HEADER, 0.0
        for number, _, names in floors:
            centre = y + _thickness(names) / 2
            if count := taken[number]:
                radius = 7.5 + 0.5 * math.sqrt(count)
                dots.append(_dot(x, centre, radius, str(count), colour, hollow=experiments))
                deepest = centre
            y += _thickness(names)
        dash = ' stroke-dasharray="2 4"' if experiments else ""
        way = f"M{x:g} {ground + HEADER:g}V{deepest:g}"
        lines.append(f'<path d="{way}" stroke="{colour}" stroke-opacity=".45" stroke-width="2"{dash}/>')
    return lines + dots


def _description(graph: ImportGraph, rooms: dict[str, tuple[list[str], list[str]]]) -> str:
    """Say the same in words, for those who do not see it."""
    sizes = ", ".join(f"{name.replace('_', '-')} {len(a) + len(b)}" for name, (a, b) in rooms.items())
    walls = "; ".join(f"{count} {wall}" for wall, count in graph.crossings().items())
    return f"Python files: {sizes}, effml-shared {len(graph.sources.modules(CORE))}. Imports: {walls}."


def _height(count: int, per_row: int = PER_ROW) -> float:
    """Return how high a part of a house with so many windows is."""
    return PITCH * -(-count // per_row) + 9


def _lines(names: list[str]) -> list[str]:
    lines = names[:1]
    for name in names[1:]:
        if len(lines[-1]) + len(name) + 3 > LONGEST:
            lines.append(name)
        else:
            lines[-1] += f" · {name}"
    return lines


def _thickness(lines: list[str]) -> float:
    return ROW + LINE * (len(lines) - 1)


def _box(x: float, y: float, w: float, h: float, fill: str, *, radius: float = 0, line: str = "") -> str:
    more = (f' rx="{radius:g}"' if radius else "") + (f' stroke="{line}"' if line else "")
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}"{more}/>'


def _dot(x: float, y: float, radius: float, text: str, colour: str, *, hollow: bool) -> str:
    paint = f'fill="{PAPER}" stroke="{colour}" stroke-width="1.5"' if hollow else f'fill="{colour}"'
    circle = f'<circle cx="{x:g}" cy="{y:g}" r="{radius:.1f}" {paint}/>'
    return circle + _text(x, y + 3.8, text, 10.5, colour if hollow else "#ffffff", weight=600, anchor="middle")


def _text(
    x: float, y: float, text: str, size: float, fill: str = INK, *, weight: int = 400, anchor: str = "start"
) -> str:
    more = (f' font-weight="{weight}"' if weight != 400 else "") + (
        f' text-anchor="{anchor}"' if anchor != "start" else ""
    )
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{fill}"{more}>{html.escape(text)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(ImportGraph()), encoding="utf-8")
    print(f"wrote {PICTURE.name}")
