"""What `eval.digits` reads of a dictionary: the measures of all concepts, what they mean, and examples to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from effml_eval.concepts.bridge import BridgeEdges
from effml_eval.concepts.concept_report import ConceptReport
from effml_eval.experiments.concept_meanings import NONE, meanings, same_meaning
from effml_eval.experiments.handwritten_digits import FACTS, Digits
from effml_eval.experiments.sae_measures import ConceptMeasures, measure_concepts_of
from effml_eval.explorer.explorer_page import concept_explorer
from effml_eval.sae.autoencoder import SparseAutoencoder

__all__ = ["Captioned", "read_concepts", "write_page"]

EXAMPLES = 8  # bridges in the figure
ENLARGED = 8  # pixels on the page per pixel of an image
TITLES = tuple(f"digit {fact}" if fact.isdigit() else fact for fact in FACTS)


class Captioned(NamedTuple):
    """Some of the images with captions, one row per caption.

    Fields:
        rows: (N) int64, of the images in the data.
        captions: N of them.
        said: (N, facts) bool.
    """

    rows: Tensor
    captions: list[str]
    said: Tensor


class _Meanings(NamedTuple):
    """Of every concept (C) int64, by its strongest images and by its strongest captions."""

    image: Tensor
    text: Tensor


def _meanings(report: ConceptReport, digits: Digits, pairs: Captioned) -> _Meanings:
    image = meanings(report.top_images.rows, digits.facts[pairs.rows])
    return _Meanings(image, meanings(report.top_texts.rows, pairs.said))


def read_concepts(
    sae: SparseAutoencoder,
    other: SparseAutoencoder,
    images: Tensor,
    texts: Tensor,
    digits: Digits,
    pairs: Captioned,
    *,
    top: int,
    edges: int,
    seed: int,
) -> ConceptMeasures:
    """Measure a dictionary on pairs of embeddings (N, d), those of `pairs`; see `measure_concepts_of` for the rest."""

    def linked(report: ConceptReport, found: BridgeEdges) -> float:
        return same_meaning(*_meanings(report, digits, pairs), found)

    found = measure_concepts_of(
        sae,
        other,
        images,
        texts,
        top=top,
        edges=edges,
        seed=seed,
        linked=linked,
        image_labels=[", ".join(_named(facts)) for facts in digits.facts[pairs.rows]],
        text_labels=pairs.captions,
        data="handwritten digits, held out",
    )
    report, meant = found.report, _meanings(found.report, digits, pairs)
    assert report.bridges is not None
    on_images, on_texts = meant.image[report.image_rate > 0], meant.text[report.text_rate > 0]
    agree = (on_images[:, None] == on_texts) & (on_texts != NONE)
    found.numbers.update(
        {
            "linked at random": float(agree.double().mean()),
            "bridges of a concept with itself": float((report.bridges.image == report.bridges.text).double().mean()),
            "concepts of a meaning, by images": float((on_images != NONE).double().mean()),
            "concepts of a meaning, by captions": float((on_texts != NONE).double().mean()),
        }
    )
    found.columns["examples"] = _examples(report, pairs)
    return found


def _named(facts: Tensor) -> list[str]:
    return [title for title, holds in zip(TITLES, facts.tolist(), strict=True) if holds]


def _examples(report: ConceptReport, pairs: Captioned) -> list[dict[str, Any]]:
    """Return the strongest bridges, every concept once at either end: images (rows of the data) and captions."""
    assert report.bridges is not None
    examples: list[dict[str, Any]] = []
    for image, text in zip(report.bridges.image.tolist(), report.bridges.text.tolist(), strict=True):
        if any(image == known["image"] or text == known["text"] for known in examples):
            continue
        rows = [row for row in report.top_images.rows[image].tolist() if row >= 0]
        lines = dict.fromkeys(pairs.captions[row] for row in report.top_texts.rows[text].tolist() if row >= 0)
        captions = list(lines)[:3]
        examples.append({"image": image, "text": text, "images": pairs.rows[rows].tolist(), "captions": captions})
        if len(examples) == EXAMPLES:
            break
    return examples


def write_page(path: Path, report: ConceptReport, dictionary: Tensor, digits: Digits, pairs: Captioned) -> None:
    """Write the page of a report: concepts named by what they mean, with the digits as dark ink on white."""
    names = {}
    for concept, ends in enumerate(zip(*map(Tensor.tolist, _meanings(report, digits, pairs)), strict=True)):
        if known := [TITLES[fact] for fact in dict.fromkeys(ends) if fact != NONE]:
            names[concept] = " / ".join(known)
    concept_explorer(
        report,
        path,
        dictionary=dictionary,
        images=(1 - digits.pixels[pairs.rows]).repeat_interleave(ENLARGED, 1).repeat_interleave(ENLARGED, 2),
        names=names,
        title="Handwritten digits: concepts of images and captions",
    )
