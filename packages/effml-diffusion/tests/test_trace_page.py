from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from effml_diffusion.puzzles.maze import Maze
from effml_diffusion.puzzles.sudoku import Sudoku
from effml_diffusion.puzzles.sudoku_tokens import SudokuTokens
from effml_diffusion.trace import Trace
from effml_diffusion.trace_page import trace_page
from effml_shared.errors import ConfigError

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "<img src=x onerror=alert(1)>",
    "{{DATA}}",
    '"\\\u2028\U0001f600\x00',
    "\ud83d",
    "]]>&lt;",
]


class Page(HTMLParser):
    """Collect the elements of a page and the text of each kind of them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "input"):
            self.open.append("data" if ("id", "data") in attrs else tag)

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], "") + data

    @property
    def data(self) -> Any:
        return json.loads(self.text["data"])


def snapshots(*rows: list[int]) -> Trace:
    return Trace.from_snapshots(torch.tensor(rows), 0)


def test_nothing_hostile_becomes_markup() -> None:
    ids = list(range(1, 1 + len(HOSTILE)))
    trace = snapshots([0] * len(ids), ids)
    plain = Page(trace_page(trace))
    for hostile in HOSTILE:
        page = trace_page(trace, labels=lambda token: HOSTILE[token - 1], title=hostile, caption=hostile)
        found = Page(page)
        assert found.elements == plain.elements
        assert found.data["labels"] == {str(token): HOSTILE[token - 1] for token in ids}
        shown = hostile.replace("\ud83d", "?")
        assert found.text["h1"] == found.text["title"] == shown
        page.encode()
        assert sorted(name for name, _ in found.attributes) == sorted(name for name, _ in plain.attributes)


def test_the_page_asks_for_nothing() -> None:
    page = trace_page(snapshots([0, 0], [1, 0], [1, 2]))
    found = Page(page)
    assert not [name for name, _ in found.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert "default-src 'none'" in page
    assert re.findall(r"https?://[^\s\"']+", page) == ["http://www.w3.org/2000/svg"]  # the name of SVG's elements
    assert not re.search(r"innerHTML|insertAdjacentHTML|outerHTML|document\.write|eval\(|url\(|@import", page)
    assert len(page) < 20_000


def test_data_hold_the_trace() -> None:
    data = Page(trace_page(snapshots([0, 3], [2, 3], [0, 3]))).data
    assert data["start"] == [0, 3]
    assert data["events"] == [[0, 0, 0, 2], [1, 2, 0, 0]]
    assert data["labels"] == {"2": "2", "3": "3"}
    assert data["scene"] == {"kind": "text"}
    assert (data["steps"], data["mask"]) == (2, 0)


def test_scenes() -> None:
    tokens = SudokuTokens(Sudoku(2, 2), lines=True)
    grid = tokens.encode(tokens.rules.grids(1))[0].tolist()
    scene = Page(trace_page(snapshots([0] * 19, grid), tokens)).data["scene"]
    assert (scene["kind"], scene["n"], scene["box"]) == ("grid", 4, [2, 2])
    assert [cell for cell in scene["cells"] if cell >= 0] == list(range(16))
    assert [i for i, cell in enumerate(scene["cells"]) if cell < 0] == [4, 9, 14]

    maze = Maze.random(3)
    data = Page(trace_page(Trace.from_flex([(0, "insert", 0, 1, 9)], 9, start=[0, 8]), maze)).data
    assert data["scene"] == {"kind": "maze", "n": 3, "passages": [list(pair) for pair in maze.passages]}
    assert data["labels"] == {"0": "1,1", "8": "3,3"}


def test_rows_that_do_not_fit_the_layout() -> None:
    tokens = SudokuTokens(Sudoku(2, 2))
    with pytest.raises(ConfigError, match=r"trace: got a row of 4 tokens or insertions, expected 16 tokens"):
        trace_page(snapshots([0] * 4), tokens)


def test_empty_rows() -> None:
    assert Page(trace_page(Trace.from_flex([], 9))).data["start"] == []
