from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from effml_eval.concepts.bridge import BridgeEdges
from effml_eval.concepts.concept_report import ConceptReport, measure_concepts
from effml_eval.concepts.top_inputs import TopInputs
from effml_eval.explorer.atom_map import atom_map, nearest_atoms
from effml_eval.explorer.explorer_page import concept_explorer, page_data
from effml_eval.explorer.thumbnails import thumbnail
from effml_shared.errors import CheckpointError, ConfigError
from numpy.typing import NDArray
from torch import Tensor

HOSTILE = [
    "</script><script>document.title='broken'</script>",
    "<!--<script>",
    "<img src=x onerror=document.title='broken'>",
    "{{DATA}}",
    '"\\\u2028\U0001f600\x00',
    "\ud83d",
    "]]>&lt;",
]
DEAD = 5


def _world() -> tuple[Tensor, Tensor, Tensor]:
    """Codes of 12 concepts on 30 pairs: 0 to 3 on images only, 6 to 9 on texts only, 5 dead, the others on both."""
    g = torch.Generator().manual_seed(0)
    image, text = ((torch.randn(30, 12, generator=g) - 0.8).clamp(min=0) for _ in range(2))
    image[:, 6:10], text[:, :4] = 0, 0
    image[:, DEAD], text[:, DEAD] = 0, 0
    return image, text, torch.nn.functional.normalize(torch.randn(12, 6, generator=g), dim=1)


def _report(**options: Any) -> ConceptReport:
    image, text, atoms = _world()
    captions = [f"a {what} in row {row}" for row, what in enumerate(["café", "dog", "Zebra crossing"] * 10)]
    labels = {"text_labels": captions, "image_labels": [f"{row}.png" for row in range(30)]}
    return measure_concepts(
        image, text, atoms, **{"other": atoms.flip(0), "top": 4, "bridges": 30, **labels, **options}
    )


def _decode(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), dtype)


class Page(HTMLParser):
    """Collect the elements of a page, their attributes, and the text of each kind of element or of each id."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.elements: list[str] = []
        self.attributes: dict[str, list[dict[str, str | None]]] = {}
        self.text: dict[str, str] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        given = dict(attrs)
        self.attributes.setdefault(given.get("id") or tag, []).append(given)
        if tag not in ("meta", "input", "img", "link"):
            self.open.append((tag, given.get("id") or ""))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for name in {name for pair in self.open for name in pair if name}:
            self.text[name] = self.text.get(name, "") + data


def test_data_hold_the_report() -> None:
    report, (_, _, atoms) = _report(about={"R2": 0.93125, "k": 8}), _world()
    data = page_data(report, dictionary=atoms)
    assert (data["concepts"], data["rows"]) == (12, [30, 30])
    for name, text in data["columns"].items():
        column = getattr(report, name)
        if column is None:
            assert text is None
        else:
            np.testing.assert_array_equal(_decode(text, "<f4"), column.float().numpy())
    assert np.isnan(_decode(data["columns"]["modality_score"], "<f4")[DEAD])
    assert report.partner is not None
    assert report.bridges is not None
    assert _decode(data["partner"], "<i4").tolist() == report.partner.tolist()
    assert _decode(data["top"]["text"]["rows"], "<i4").tolist() == report.top_texts.rows.flatten().tolist()
    assert _decode(data["bridges"]["text"], "<i4").tolist() == report.bridges.text.tolist()
    assert data["pair_similarity"] == report.pair_similarity
    assert data["labels"]["text"] == {str(row): label for row, label in report.text_labels.items()}
    assert data["about"] == {"R2": "0.9313", "k": "8"}
    nearest = nearest_atoms(atoms, 15)
    np.testing.assert_array_equal(_decode(data["map"], "<f4"), atom_map(atoms, nearest).flatten().numpy())
    assert _decode(data["nearest"]["indices"], "<i4").reshape(12, -1).tolist() == nearest.indices[:, :6].tolist()


def test_what_was_not_measured_is_absent() -> None:
    image, text, _ = _world()
    data = page_data(measure_concepts(image, text[:7], torch.eye(12), paired=False))
    for name in ("partner", "bridges", "pair_similarity", "map", "nearest"):
        assert data[name] is None
    assert data["columns"]["alignment"] is data["columns"]["stability"] is None
    assert data["thumbnails"] == data["names"] == data["about"] == {}


def test_nothing_hostile_becomes_markup(tmp_path: Path) -> None:
    plain = Page(concept_explorer(_report(), tmp_path / "plain.html").read_text())
    for hostile in HOSTILE:
        report = _report(text_labels=[hostile] * 30, image_labels=[hostile] * 30, about={hostile: hostile})
        path = concept_explorer(report, tmp_path / "page.html", title=hostile, names={0: hostile})
        found = Page(path.read_text())
        assert found.elements == plain.elements
        data = json.loads(found.text["data"])
        assert set(data["labels"]["text"].values()) == set(data["names"].values()) == set(data["about"]) == {hostile}
        shown = hostile.replace("\ud83d", "?").replace("\x00", "\ufffd")
        assert {found.text[name].replace("\x00", "\ufffd") for name in ("title", "h1")} == {shown}


def test_the_page_asks_for_nothing_and_is_the_same_every_time(tmp_path: Path) -> None:
    _, _, atoms = _world()
    one, two = (concept_explorer(_report(), tmp_path / name, dictionary=atoms) for name in ("one.html", "two.html"))
    page = one.read_text()
    assert page == two.read_text()
    found = Page(page)
    given = [name for all_given in found.attributes.values() for attributes in all_given for name in attributes]
    assert not {"src", "href", "srcset", "action", "data"} & set(given)
    assert "default-src 'none'" in page
    code = page.replace(found.text["data"], "")
    assert not re.search(r"innerHTML|insertAdjacentHTML|outerHTML|document\.write|eval\(|url\(|@import|https?:", code)
    assert not re.search(r"\{\{[A-Z]+\}\}", page)
    assert len(code) < 60_000
    assert len(page) - len(code) < 16_000


def test_thumbnails_go_to_the_concepts_of_most_energy_first() -> None:
    report = _report()
    pictures = np.random.default_rng(0).random((30, 9, 9, 3))
    order = report.top_images.rows[report.energy.argsort(descending=True)]
    first = list(dict.fromkeys(row for row in order.T.flatten().tolist() if row >= 0))
    assert list(page_data(report, images=pictures, max_thumbnails=5)["thumbnails"]) == [str(row) for row in first[:5]]
    everything = page_data(report, images=torch.from_numpy(pictures), thumbnail_side=4)["thumbnails"]
    assert everything == {str(row): thumbnail(pictures[row], 4) for row in first}
    some = page_data(report, images={first[2]: pictures[0]})["thumbnails"]
    assert list(some) == [str(first[2])]
    assert page_data(report, images=pictures, max_thumbnails=0)["thumbnails"] == {}


def test_errors(tmp_path: Path) -> None:
    report = _report()
    with pytest.raises(ConfigError, match=r"^dictionary: got 3 atoms, expected 12, one per concept of the report$"):
        page_data(report, dictionary=torch.eye(3))
    with pytest.raises(ConfigError, match=r"^names: got concept 12, expected 0 to 11$"):
        page_data(report, names={12: "x"})
    with pytest.raises(ConfigError, match=r"^images: got none for row \d+, expected one for each image of the codes$"):
        page_data(report, images=[])
    with pytest.raises(ConfigError, match=r"^images: row \d+: image: got numbers outside \[0, 1\]"):
        page_data(report, images=np.full((30, 4, 4), 7.0))
    with pytest.raises(ConfigError, match=r"^images: got int, expected something that gives an image for a row$"):
        page_data(report, images=5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^max_thumbnails: got -1"):
        page_data(report, max_thumbnails=-1)
    (tmp_path / "directory").mkdir()
    with pytest.raises(CheckpointError, match=r"^cannot write .*/directory: Is a directory"):
        concept_explorer(report, tmp_path / "directory")
    assert [path.name for path in tmp_path.iterdir()] == ["directory"]
    none = torch.zeros(0)
    top = TopInputs(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1))
    with pytest.raises(ConfigError, match=r"^report: number of concepts: got 0"):
        page_data(ConceptReport(1, 1, none, none, none, none, none, none, none, top, top))


# ---- in a browser

Browse = Callable[..., Page]


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Return what opens a page in a headless browser, runs a script in it, and gives back the document it ends with."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine: the page was not opened in a browser")

    def run(path: Path, address: str = "", script: str = "", *, size: str = "1400,900") -> Page:
        opened = tmp_path / "opened.html"
        tail = f"<script>window.addEventListener('load', async () => {{{script}}});</script></body>"
        opened.write_text(path.read_text().replace("</body>", tail))
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=6000"]
        command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={size}"]
        done = subprocess.run([*command, opened.as_uri() + address], capture_output=True, text=True, timeout=120)
        assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return Page(done.stdout)

    return run


def test_it_opens_where_its_address_says(tmp_path: Path, browse: Browse) -> None:
    _, _, atoms = _world()
    report = _report(text_labels=HOSTILE[:1] * 30)
    assert report.bridges is not None
    concept = int(report.bridges.image[0])
    path = concept_explorer(report, tmp_path / "page.html", dictionary=atoms, title="Twelve concepts")
    page = browse(path, f"#select={concept}&view=chart")
    assert page.text["title"] == page.text["h1"] == "Twelve concepts"
    assert page.text["h2"] == f"Concept {concept}"
    assert HOSTILE[0] in page.text["panel"]
    assert f"modality score {report.modality_score[concept]:.2f}" in page.text["panel"]
    links = report.bridges_of(concept)
    first = int(links.text[0] if links.image[0] == concept else links.image[0])
    assert f"#{first}" in page.text["bridges"]
    assert page.elements.count("canvas") == 1
    canvas = page.attributes["map"][0]
    assert 12 <= int(canvas["data-discs"] or 0) <= 40


def test_keys_search_and_clicks(tmp_path: Path, browse: Browse) -> None:
    _, _, atoms = _world()
    path = concept_explorer(_report(), tmp_path / "page.html", dictionary=atoms, names={2: "stripes"})
    script = """
    const seen = {}, wait = time => new Promise(done => setTimeout(done, time));
    const press = (key, target = document.activeElement) =>
        target.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    const heading = () => document.querySelector("h2")?.textContent ?? "";
    const numbers = () => [...document.querySelectorAll(".row")].map(line => Number(line.dataset.concept));
    const search = async text => {
        byId("search").value = text;
        byId("search").dispatchEvent(new Event("input"));
        await wait(200);
    };
    const choose = list => {
        byId("list").value = list;
        byId("list").dispatchEvent(new Event("change", { bubbles: true }));
    };
    await wait(100);
    seen.byEnergy = numbers();
    press("/");
    seen.searching = document.activeElement.id;
    await search("CAFE");
    seen.accents = numbers();
    await search("zebra row");
    seen.words = numbers();
    await search("#7");
    seen.number = numbers();
    await search("no such thing");
    seen.nothing = [numbers().length, document.querySelector(".none").textContent];
    await search("stripes");
    seen.name = numbers();
    press("Enter");
    await wait(50);
    seen.entered = heading();
    seen.hash = location.hash;
    press("Escape");
    await wait(50);
    seen.left = [heading(), numbers()];
    press("Escape", byId("search"));
    await wait(50);
    seen.empty = [byId("search").value, numbers().length];

    press("ArrowRight", canvas);
    seen.walk = [heading()];
    for (const key of ["ArrowLeft", "ArrowUp", "ArrowDown", "ArrowRight"]) {
        const before = state.selected, next = map.next(before, ...DIRECTIONS[key]);
        press(key, canvas);
        seen.walk.push([before, next, state.selected]);
    }
    byId("back").click();
    await wait(50);

    const gap = (c, [x, y]) => Math.hypot(map.screenX(c) - x, map.screenY(c) - y) - map.size(c);
    seen.hits = Array.from({ length: record.n }, (_, c) => {
        const point = [map.screenX(c), map.screenY(c)], hit = map.at(...point);
        return hit === c || (gap(hit, point) <= 0 && map.size(hit) <= map.size(c));  // the smaller lies on top
    });
    seen.misses = map.at(-500, -500);
    map.zoomAt(4, 300, 200);
    seen.zoomed = map.at(map.screenX(3), map.screenY(3), 1);
    const box = canvas.getBoundingClientRect();
    const at = { clientX: box.left + map.screenX(3), clientY: box.top + map.screenY(3), pointerId: 1, bubbles: true };
    canvas.setPointerCapture = () => {};
    canvas.dispatchEvent(new PointerEvent("pointermove", at));
    seen.tip = byId("tip").textContent;
    canvas.dispatchEvent(new PointerEvent("pointerdown", at));
    canvas.dispatchEvent(new PointerEvent("pointerup", at));
    seen.clicked = heading();
    byId("back").click();

    seen.lists = {};
    for (const { value } of [...byId("list").options]) {
        choose(value);
        seen.lists[value] = numbers();
    }
    choose("energy");
    document.querySelectorAll(".bar")[19].click();
    seen.bin = numbers();
    document.querySelector('[data-view="chart"]').click();
    await wait(100);
    seen.view = [map.view, location.hash];
    document.body.append(make("pre", { id: "result" }, JSON.stringify(seen)));
    """
    seen = json.loads(browse(path, "", script).text["result"])
    report = _report()
    order = report.energy.argsort(descending=True).tolist()[:-1]
    assert DEAD not in order
    assert seen["byEnergy"] == order
    assert seen["searching"] == "search"

    def holding(word: str) -> list[int]:
        rows = {row for row, label in report.text_labels.items() if word in label}
        return [c for c in order if rows & set(report.top_texts.rows[c].tolist())]

    assert seen["accents"] == holding("café")
    assert seen["words"] == holding("Zebra")
    assert seen["number"][0] == 7
    assert seen["nothing"] == [0, "No concept has this in its name or its strongest inputs."]
    assert seen["name"] == [2]
    assert (seen["entered"], seen["hash"]) == ("Concept 2", "#select=2&search=stripes")
    assert seen["left"] == ["", [2]]
    assert seen["empty"] == ["", 11]
    assert seen["walk"][0] == f"Concept {order[0]}"
    for before, found, after in seen["walk"][1:]:
        assert after == (before if found < 0 else found)
    assert len({tuple(step) for step in seen["walk"][1:]}) > 2
    assert seen["hits"] == [True] * 12
    assert (seen["misses"], seen["zoomed"], seen["clicked"]) == (-1, 3, "Concept 3")
    assert seen["tip"].startswith("#3 ")
    score = report.modality_score
    assert seen["lists"]["image"] == [c for c in order if score[c] > 0.9]
    assert seen["lists"]["text"] == [c for c in order if score[c] < 0.1]
    assert seen["lists"]["dead"] == [DEAD]
    assert report.bridges is not None
    pairs = torch.stack([report.bridges.image, report.bridges.text], 1).flatten().tolist()
    assert seen["lists"]["bridges"] == pairs
    assert seen["bin"] == [c for c in order if score[c] >= 0.95]
    assert seen["view"] == ["chart", "#bin=19&view=chart"]


def test_ten_thousand_concepts_are_one_frame_of_bounded_work(
    tmp_path: Path, browse: Browse, monkeypatch: pytest.MonkeyPatch
) -> None:
    n, g = 10_000, torch.Generator().manual_seed(0)
    energy = torch.rand(2, n, generator=g).double() ** 4
    energy[:, :100] = 0
    ones, rows = torch.ones(n), torch.randint(0, 5000, (n, 8), generator=g)
    report = ConceptReport(
        image_rows=5000,
        text_rows=5000,
        image_energy=energy[0],
        text_energy=energy[1],
        image_rate=energy[0],
        text_rate=energy[1],
        modality_score=energy[0] / energy.sum(0),
        probe_accuracy=0.5 * ones,
        atom_norm=ones,
        top_images=TopInputs(rows, rows.float()),
        top_texts=TopInputs(rows, rows.float()),
        bridges=BridgeEdges(torch.randint(0, n, (5000,)), torch.randint(0, n, (5000,)), torch.linspace(1, 0.1, 5000)),
        text_labels={row: f"caption {row} of a picture" for row in range(5000)},
    )
    places = torch.rand(n, 2, generator=g) * 2 - 1
    monkeypatch.setattr("effml_eval.explorer.explorer_page.atom_map", lambda *_: places)
    script = """
    await new Promise(done => setTimeout(done, 300));
    const { width, height } = canvas, pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
    let painted = 0;
    for (let i = 3; i < pixels.length; i += 4) painted += pixels[i] > 0;
    // The grid against all concepts, at points that hold a disc and points that do not.
    const gap = (c, x, y) => Math.hypot(map.screenX(c) - x, map.screenY(c) - y) - map.size(c);
    const hits = Array.from({ length: 200 }, (_, i) => {
        const [x, y] = [(i * 61.8) % map.width, (i * 37.7) % map.height], hit = map.at(x, y, 3);
        const gaps = Array.from(record.byEnergy, c => gap(c, x, y)), least = Math.min(...gaps);
        return hit < 0 ? least >= 3 : least > 0 ? gap(hit, x, y) === least : gap(hit, x, y) <= 0;
    });
    const seen = { ...canvas.dataset, painted: painted / width / height, hits };
    seen.found = record.search("caption 77 ").length;
    seen.elements = document.querySelectorAll("*").length;
    document.body.append(make("pre", { id: "result" }, JSON.stringify(seen)));
    """
    same = dataclasses.replace(report, image_energy=ones.double(), text_energy=ones.double())
    for case in (report, same):
        path = concept_explorer(case, tmp_path / "page.html", dictionary=torch.eye(n, 8) + 1)
        seen = json.loads(browse(path, "", script).text["result"])
        assert int(seen["discs"]) == n  # every concept is painted once
        assert int(seen["paints"]) <= 1500 + 41 + 2  # those with a rim, one path per colour, the faint and the dead
        assert 0.02 < seen["painted"] < 0.5
        assert seen["elements"] < 700  # none per concept
        assert all(seen["hits"])
        assert seen["found"] > 0
