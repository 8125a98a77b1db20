"""A page that shows one generation move: a Sudoku grid, a path through a maze, or text, one step at a time.

The page is one string of HTML with all it needs inside, no server, no network, some ten kilobytes; its content security
policy allows no request at all. Tokens enter as data and are shown as text, so that no token can act as markup. Without
scripts it shows the last row as text. Keys: space, arrows, Home, End; `page.html#12` opens at step 12.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from effml_shared.errors import ConfigError

from effml_diffusion.puzzles.maze import Maze
from effml_diffusion.puzzles.sudoku_tokens import SudokuTokens
from effml_diffusion.trace import KINDS, Trace

__all__ = ["trace_page"]


def trace_page(
    trace: Trace,
    scene: SudokuTokens | Maze | None = None,
    *,
    labels: Callable[[int], str] | None = None,
    title: str = "A generation, step by step",
    caption: str = "",
) -> str:
    """Return a page that animates a trace.

    Args:
        scene: the layout of a Sudoku, the maze that a path is in, or None for text.
        labels: what to show for a token, such as a tokenizer's decoder; None: its number.

    Raises:
        ConfigError: the row does not fit the Sudoku's layout.

    >>> page = trace_page(Trace((1, 2), (), steps=0, mask_id=0), labels=lambda token: "</script><b>")
    >>> "</script><b>" in page
    False
    """
    last = trace.frames()[-1]
    name = labels or _default_labels(scene)
    tokens = sorted({*trace.start, *(event.token for event in trace.events)} - {trace.mask_id})
    data = {
        "steps": trace.steps,
        "mask": trace.mask_id,
        "start": trace.start,
        "events": [[event.step, KINDS.index(event.event), event.position, event.token] for event in trace.events],
        "labels": {token: name(token) for token in tokens},
        "scene": _scene(scene, trace),
    }
    plain = " ".join("□" if slot.token == trace.mask_id else name(slot.token) for slot in last)
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    parts = {
        "TITLE": _markup_safe(title),
        "CAPTION": _markup_safe(caption),
        "PLAIN": _markup_safe(plain),
        "DATA": _script_safe(json.dumps(data, separators=(",", ":"))),
    }
    before, *fields = page.split("{{")
    return before + "".join(parts[field.split("}}")[0]] + field.split("}}", 1)[1] for field in fields)


def _scene(scene: SudokuTokens | Maze | None, trace: Trace) -> dict[str, Any]:
    if scene is None:
        return {"kind": "text"}
    if isinstance(scene, Maze):
        return {"kind": "maze", "n": scene.n, "passages": scene.passages}
    if len(trace.start) != scene.length or any(event.event == "insert" for event in trace.events):
        raise ConfigError(
            f"trace: got a row of {len(trace.start)} tokens or insertions, expected {scene.length} tokens"
        )
    rules = scene.rules
    cells = [row * rules.n + column if column < rules.n else -1 for row, column, _ in scene.places.tolist()]
    return {"kind": "grid", "n": rules.n, "box": [rules.box_rows, rules.box_columns], "cells": cells}


def _default_labels(scene: SudokuTokens | Maze | None) -> Callable[[int], str]:
    if isinstance(scene, Maze):
        return lambda cell: f"{cell // scene.n + 1},{cell % scene.n + 1}"
    return str


def _markup_safe(text: str) -> str:
    """Return text that HTML shows as it is; half a surrogate pair, which no file can hold, becomes a question mark."""
    return html.escape(text.encode(errors="replace").decode())


def _script_safe(text: str) -> str:
    """Return JSON that can stand in a script element: nothing in it can end the element or begin a comment."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
