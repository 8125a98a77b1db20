"""The record of one dictionary's concepts: everything that a reader or a page needs, without the model or the data.

One row per concept, and the strongest bridges. What was not measured is None; what a concept has none of (a modality
score without energy, a partner in another run) is NaN or -1. `measure_concepts` fills it from codes and a dictionary;
it is stored as one safetensors file whose header holds all that is not a tensor. Cost: the sum of the metrics.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from effml_shared.checks import check_count
from effml_shared.errors import CheckpointError, ConfigError
from effml_shared.files import replacing
from effml_shared.tree import read_tree, write_tree
from torch import Tensor, linalg

from effml_eval.concepts.bridge import BridgeAccumulator, BridgeEdges
from effml_eval.concepts.code_entries import Codes, check_codes, check_matrix, n_concepts_of
from effml_eval.concepts.energy import ModalityEnergy
from effml_eval.concepts.firing import Firing
from effml_eval.concepts.matching import match_dictionaries
from effml_eval.concepts.modality import modality_alignment, modality_direction, modality_score
from effml_eval.concepts.modality_probe import modality_probe
from effml_eval.concepts.top_inputs import TopInputs, top_inputs

__all__ = ["ConceptReport", "measure_concepts"]

FORMAT = 1
COLUMNS = (
    "image_energy",
    "text_energy",
    "image_rate",
    "text_rate",
    "modality_score",
    "probe_accuracy",
    "atom_norm",
    "alignment",
    "stability",
    "partner",
)


@dataclass
class ConceptReport:
    """What was measured of C concepts.

    Attributes:
        image_rows: number of image embeddings it was measured on.
        text_rows: number of text embeddings.
        image_energy: (C) float64, |mean code x atom| over images.
        text_energy: (C) float64, over texts.
        image_rate: (C) float64, fraction of images on which the concept is active.
        text_rate: (C) float64, of texts.
        modality_score: (C) float64 in [0, 1], 1 fires on images only; NaN for concepts without energy.
        probe_accuracy: (C) float64 in [.5, 1], balanced accuracy of the best threshold between the modalities.
        atom_norm: (C).
        top_images: rows of the images that activate each concept most, with their codes.
        top_texts: the same of texts.
        alignment: (C) in [0, 1], |cos| of the atom with the modality axis; None without embeddings.
        stability: (C) cosine to the partner atom in another run; None without one.
        partner: (C) int64, that atom's index there, or -1.
        stability_bound: mean stability that no matching passes.
        bridges: strongest pairs of image and text concepts; None where the sets are no pairs.
        pair_similarity: mean product of reconstructed pairs, which all bridges add up to.
        image_labels: row to path or title, of rows that `top_images` names.
        text_labels: row to caption, of rows that `top_texts` names.
        about: free description, plain values: model, data, configuration, R2, seed.
    """

    image_rows: int
    text_rows: int
    image_energy: Tensor
    text_energy: Tensor
    image_rate: Tensor
    text_rate: Tensor
    modality_score: Tensor
    probe_accuracy: Tensor
    atom_norm: Tensor
    top_images: TopInputs
    top_texts: TopInputs
    alignment: Tensor | None = None
    stability: Tensor | None = None
    partner: Tensor | None = None
    stability_bound: float | None = None
    bridges: BridgeEdges | None = None
    pair_similarity: float | None = None
    image_labels: dict[int, str] = field(default_factory=dict)
    text_labels: dict[int, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = self.n_concepts
        for name in COLUMNS:
            column = getattr(self, name)
            if column is not None and column.shape != (n,):
                raise ConfigError(f"{name}: got shape {tuple(column.shape)}, expected ({n},), one per concept")
        for name in ("top_images", "top_texts"):
            rows = getattr(self, name).rows
            if rows.ndim != 2 or len(rows) != n:
                raise ConfigError(f"{name}: got rows of shape {tuple(rows.shape)}, expected ({n}, top)")

    @property
    def n_concepts(self) -> int:
        return len(self.image_energy)

    @property
    def energy(self) -> Tensor:
        """(C) float64, balanced between the modalities."""
        return ModalityEnergy(self.image_energy, self.text_energy).balanced

    def bridges_of(self, concept: int) -> BridgeEdges:
        """Return the stored bridges at a concept, on either side, strongest first.

        Raises:
            ConfigError: there is no such concept, or bridges were not measured.
        """
        if self.bridges is None or not 0 <= concept < self.n_concepts:
            known = "none were measured" if self.bridges is None else f"concepts are 0 to {self.n_concepts - 1}"
            raise ConfigError(f"concept: got {concept}, expected one with bridges: {known}")
        kept = (self.bridges.image == concept) | (self.bridges.text == concept)
        return BridgeEdges(*(column[kept] for column in self.bridges))

    def save(self, path: str | Path) -> None:
        """Write one safetensors file.

        Raises:
            CheckpointError: it cannot be written, or `about` holds something else than plain values and tensors.
        """
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        tree = {name: dict(value._asdict()) if hasattr(value, "_asdict") else value for name, value in fields.items()}
        with replacing(Path(path)) as partial:
            write_tree(partial, {"concept_report": FORMAT, **tree})

    @classmethod
    def load(cls, path: str | Path) -> ConceptReport:
        """Read back what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, no report, or of a newer format.
        """
        tree = read_tree(Path(path))
        version = tree.pop("concept_report", None) if isinstance(tree, dict) else None
        if version != FORMAT:
            raise CheckpointError(f"{path}: got format {version!r}, expected a concept report of format {FORMAT}")
        try:
            for name, kind in (("top_images", TopInputs), ("top_texts", TopInputs), ("bridges", BridgeEdges)):
                if tree[name] is not None:
                    tree[name] = kind(**tree[name])
            return cls(**tree)
        except (KeyError, TypeError, AttributeError, ConfigError) as error:
            raise CheckpointError(f"{path}: got a report that does not fit together ({error})") from None


def measure_concepts(
    image_codes: Codes,
    text_codes: Codes,
    dictionary: Tensor,
    *,
    images: Tensor | None = None,
    texts: Tensor | None = None,
    other: Tensor | None = None,
    paired: bool = True,
    top: int = 8,
    bridges: int = 200,
    image_labels: Mapping[int, str] | Sequence[str] | None = None,
    text_labels: Mapping[int, str] | Sequence[str] | None = None,
    about: Mapping[str, Any] | None = None,
) -> ConceptReport:
    """Measure every concept of a dictionary.

    Args:
        image_codes: (N, C).
        text_codes: (M, C).
        dictionary: atoms (C, d).
        images: embeddings (N', d) that say where the modality axis lies; need not be those of the codes.
        texts: embeddings (M', d), with `images`.
        other: atoms of another run, any number, to match with.
        paired: row n of both codes belongs together, so that bridges can be measured.
        top: inputs to keep per concept and modality.
        bridges: strongest ones to keep.
        image_labels: path or title by row; only those of rows that the report names are kept.
        text_labels: caption by row.
        about: what describes the model and data.

    Raises:
        ConfigError: shapes do not fit, something is not finite, a set is empty, or only one modality has embeddings.
    """
    check_count("top", top, 1)
    if (images is None) != (texts is None):
        raise ConfigError("images, texts: got one of them, expected both or none")
    atoms = check_matrix("dictionary", dictionary)
    check_codes("image_codes", image_codes, len(atoms))
    check_codes("text_codes", text_codes, len(atoms))
    firing = [_firing(codes) for codes in (image_codes, text_codes)]
    norms = linalg.vector_norm(atoms, dim=1).cpu()
    image_energy, text_energy = (fired.energy.abs().cpu() * norms.double() for fired in firing)
    matching = None if other is None else match_dictionaries(atoms, other, rectangular=True)
    meter = BridgeAccumulator(atoms) if paired else None
    if meter is not None:
        meter.update(image_codes, text_codes)
    alignment = None
    if images is not None and texts is not None:
        alignment = _alignment(atoms, modality_direction(images, texts)).cpu()
    top_images, top_texts = (_on_cpu(top_inputs(codes, top)) for codes in (image_codes, text_codes))
    return ConceptReport(
        image_rows=firing[0].rows,
        text_rows=firing[1].rows,
        image_energy=image_energy,
        text_energy=text_energy,
        image_rate=firing[0].rate.cpu(),
        text_rate=firing[1].rate.cpu(),
        modality_score=modality_score(image_energy, text_energy),
        probe_accuracy=modality_probe(image_codes, text_codes).accuracy.cpu(),
        atom_norm=norms,
        top_images=top_images,
        top_texts=top_texts,
        alignment=alignment,
        stability=None if matching is None else matching.similarity.cpu(),
        partner=None if matching is None else matching.partner.cpu(),
        stability_bound=None if matching is None else matching.upper_bound,
        bridges=None if meter is None else _on_cpu(meter.edges(bridges)),
        pair_similarity=None if meter is None else meter.pair_similarity,
        image_labels=_labels(image_labels, top_images),
        text_labels=_labels(text_labels, top_texts),
        about=dict(about or {}),
    )


def _firing(codes: Codes) -> Firing:
    device = codes.device if isinstance(codes, Tensor) else codes.values.device
    firing = Firing(n_concepts_of(codes), device=device)
    firing.update(codes)
    return firing


def _alignment(atoms: Tensor, axis: Tensor) -> Tensor:
    """Return |cos| of every atom with the axis; NaN for an atom of norm 0, which has no direction."""
    answer = atoms.new_full((len(atoms),), torch.nan)
    kept = (atoms != 0).any(1)
    answer[kept] = modality_alignment(atoms[kept], axis)
    return answer


def _labels(labels: Mapping[int, str] | Sequence[str] | None, top: TopInputs) -> dict[int, str]:
    if labels is None:
        return {}
    rows = [row for row in top.rows.unique().tolist() if row >= 0]
    known = labels if isinstance(labels, Mapping) else dict(enumerate(labels))
    return {row: str(known[row]) for row in rows if row in known}


def _on_cpu(record: Any) -> Any:
    return type(record)(*(column.cpu() for column in record))
