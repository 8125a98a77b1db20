"""A page to walk through the concepts of a dictionary: a map of all, and what is known of the one that is selected.

One file of HTML with all it needs inside, no server, no network; its content security policy allows no request at all.
Columns enter as base64 of typed arrays, some .3 kB a concept with 8 inputs of each modality, and labels as data that is
only ever shown as text, so that no label can act as markup. The page draws on one canvas and keeps no element per
concept: 10,000 of them are one pass over arrays per frame. It opens where its address says: `page.html#select=3`,
`#search=dog`, `#list=bridges`, `#bin=19`, `#view=chart`, joined by `&`.
"""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.files import write_whole
from torch import Tensor

from effml_eval.concepts.code_entries import check_matrix
from effml_eval.concepts.concept_report import COLUMNS, ConceptReport
from effml_eval.explorer.atom_map import atom_map, nearest_atoms
from effml_eval.explorer.thumbnails import thumbnail

__all__ = ["Images", "concept_explorer", "page_data"]

NEIGHBOURS = 15  # of the map; the page lists the first of them
LISTED = 6
FLOATS = COLUMNS[:-1]  # the last, the partner, is an index
SCRIPTS = (
    "record.js",
    "places.js",
    "concept_map.js",
    "elements.js",
    "overview.js",
    "concept.js",
    "state.js",
    "pointer.js",
    "keyboard.js",
    "explorer.js",
)


class Images(Protocol):
    """Anything that gives the image of a row: a list, a mapping that need not know all rows, an array, a data set."""

    def __getitem__(self, row: int, /) -> Any: ...


def concept_explorer(
    report: ConceptReport,
    path: str | Path,
    *,
    dictionary: Tensor | None = None,
    images: Images | None = None,
    names: Mapping[int, str] | None = None,
    title: str = "Concepts",
    thumbnail_side: int = 64,
    max_thumbnails: int = 600,
) -> Path:
    """Write the page of a report and return its path.

    Args:
        report: what was measured; captions and titles are those of its labels.
        dictionary: atoms (C, d), for the map and the nearest atoms; without it, concepts are laid out by modality score
            and energy alone.
        images: image by row of the image codes, for thumbnails; see `thumbnail` for what an image can be.
        names: of concepts, by index, where somebody named them.
        thumbnail_side: pixels.
        max_thumbnails: how many to embed, 2 to 10 kB each: every concept's first, those of most energy first, then
            every concept's second, and so on.

    Raises:
        ConfigError: the report has no concepts, the dictionary or a name does not fit it, or an image cannot be read.
        CheckpointError: the page cannot be written; an older one is untouched.
    """
    data = page_data(
        report,
        dictionary=dictionary,
        images=images,
        names=names,
        thumbnail_side=thumbnail_side,
        max_thumbnails=max_thumbnails,
    )
    here = Path(__file__).parent
    parts = {
        "TITLE": html.escape(title.encode(errors="replace").decode()),
        "STYLE": (here / "explorer.css").read_text(encoding="utf-8"),
        "SCRIPT": "\n".join((here / script).read_text(encoding="utf-8") for script in SCRIPTS),
        "DATA": _script_safe(json.dumps(data, separators=(",", ":"), allow_nan=False)),
    }
    before, *fields = (here / "page.html").read_text(encoding="utf-8").split("{{")
    page = before + "".join(parts[field.split("}}")[0]] + field.split("}}", 1)[1] for field in fields)
    path = Path(path)
    write_whole(path, page)
    return path


def page_data(
    report: ConceptReport,
    *,
    dictionary: Tensor | None = None,
    images: Images | None = None,
    names: Mapping[int, str] | None = None,
    thumbnail_side: int = 64,
    max_thumbnails: int = 600,
) -> dict[str, Any]:
    """Return what `concept_explorer` embeds, as plain values: arrays are base64 of little-endian float32 and int32.

    Raises:
        ConfigError: see `concept_explorer`.
    """
    n = report.n_concepts
    check_count("report: number of concepts", n, 1)
    check_count("max_thumbnails", max_thumbnails, 0)
    for concept in names or {}:
        if not isinstance(concept, int) or not 0 <= concept < n:
            raise ConfigError(f"names: got concept {concept!r}, expected 0 to {n - 1}")
    bridges = report.bridges
    return {
        "concepts": n,
        "rows": [report.image_rows, report.text_rows],
        "columns": {name: _floats(getattr(report, name)) for name in FLOATS},
        "partner": _integers(report.partner),
        "top": {
            side: {"rows": _integers(top.rows), "codes": _floats(top.codes), "count": top.rows.shape[1]}
            for side, top in (("image", report.top_images), ("text", report.top_texts))
        },
        "bridges": None
        if bridges is None
        else {"image": _integers(bridges.image), "text": _integers(bridges.text), "score": _floats(bridges.score)},
        "pair_similarity": _number(report.pair_similarity),
        "labels": {
            "image": {str(row): str(label) for row, label in report.image_labels.items()},
            "text": {str(row): str(label) for row, label in report.text_labels.items()},
        },
        "names": {str(concept): str(name) for concept, name in (names or {}).items()},
        "about": {str(key): _shown(value) for key, value in report.about.items()},
        "thumbnails": _thumbnails(report, images, thumbnail_side, max_thumbnails),
        **_neighbourhood(dictionary, n),
    }


def _neighbourhood(dictionary: Tensor | None, n_concepts: int) -> dict[str, Any]:
    if dictionary is None:
        return {"map": None, "nearest": None}
    atoms = check_matrix("dictionary", dictionary)
    if len(atoms) != n_concepts:
        raise ConfigError(f"dictionary: got {len(atoms)} atoms, expected {n_concepts}, one per concept of the report")
    if n_concepts == 1:
        return {"map": _floats(atom_map(atoms)), "nearest": None}
    nearest = nearest_atoms(atoms, NEIGHBOURS)
    indices, cosines = (column[:, :LISTED] for column in nearest)
    listed = {"indices": _integers(indices), "cosines": _floats(cosines), "count": indices.shape[1]}
    return {"map": _floats(atom_map(atoms, nearest)), "nearest": listed}


def _thumbnails(report: ConceptReport, images: Images | None, side: int, most: int) -> dict[str, str]:
    if images is None:
        return {}
    if not hasattr(images, "__getitem__"):
        raise ConfigError(f"images: got {type(images).__name__}, expected something that gives an image for a row")
    by_energy = report.top_images.rows[report.energy.argsort(descending=True, stable=True)]
    wanted = dict.fromkeys(row for row in by_energy.T.flatten().tolist() if row >= 0)
    found: dict[str, str] = {}
    for row in wanted:
        if len(found) >= most:
            break
        if isinstance(images, Mapping) and row not in images:
            continue
        try:
            image = images[row]
        except IndexError:
            raise ConfigError(f"images: got none for row {row}, expected one for each image of the codes") from None
        try:
            found[str(row)] = thumbnail(image, side)
        except ConfigError as error:
            raise ConfigError(f"images: row {row}: {error}") from None
    return found


def _floats(column: Tensor | None) -> str | None:
    return None if column is None else _base64(column, "<f4")


def _integers(column: Tensor | None) -> str | None:
    return None if column is None else _base64(column, "<i4")


def _base64(column: Tensor, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(column.detach().cpu().numpy(), dtype).tobytes()).decode()


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}" if value.numel() > 1 else f"{value.item():.4g}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _script_safe(text: str) -> str:
    """Return JSON that can stand in a script element: nothing in it can end the element or begin a comment."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
