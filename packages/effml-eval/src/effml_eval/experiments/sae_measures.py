"""What experiments on concepts measure: linear methods beside the autoencoders, and the concepts of two of these."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from effml_shared import seeding
from torch import Tensor

from effml_eval.concepts.baselines.ica import ica
from effml_eval.concepts.baselines.kmeans import kmeans
from effml_eval.concepts.baselines.linear_dictionary import LinearDictionary, largest_codes
from effml_eval.concepts.baselines.matrix_factorization import semi_nmf
from effml_eval.concepts.baselines.pca import pca
from effml_eval.concepts.bridge import BridgeAccumulator, BridgeEdges, bridge_edges
from effml_eval.concepts.code_entries import Codes
from effml_eval.concepts.concept_report import ConceptReport, measure_concepts
from effml_eval.concepts.energy import energy_share
from effml_eval.concepts.firing import l0
from effml_eval.concepts.matching import match_dictionaries
from effml_eval.concepts.modality import modality_histogram
from effml_eval.concepts.reconstruction import r2
from effml_eval.concepts.stability import energy_stability, stability_null
from effml_eval.sae.autoencoder import SparseAutoencoder
from effml_eval.sae.sparse_codes import SparseCodes

__all__ = ["ConceptMeasures", "linear_points", "measure_concepts_of"]

SCORE_BINS = 10  # of modality scores: the outer ones are "below .1" and "above .9"
SEMI_NMF_SWEEPS = 60


@dataclass(frozen=True)
class ConceptMeasures:
    """What the claims and figures read, and the record of every concept.

    Attributes:
        numbers: scalars by name.
        columns: of plain values, for the figures.
        report: to be stored beside the run.
    """

    numbers: dict[str, float]
    columns: dict[str, list[Any]]
    report: ConceptReport


def linear_points(
    train: Tensor, held_out: Tensor, n_concepts: int, ks: Sequence[int], seed: int
) -> dict[str, list[dict[str, float]]]:
    """Fit the linear methods to rows (N, d) and return `l0` and `r2` of each on held-out rows (M, d), for each k.

    Codes of independent components and of semi-NMF are cut to the k largest of every row; k-means has one active code.
    """
    draws = seeding.generator(seed, "linear methods")
    models: dict[str, LinearDictionary] = {
        "k-means": kmeans(train, n_concepts, code="projection", generator=draws),
        "ICA": ica(train, min(n_concepts, *train.shape), generator=draws),
        "semi-NMF": semi_nmf(train, n_concepts, iterations=SEMI_NMF_SWEEPS, generator=draws),
    }
    points: dict[str, list[dict[str, float]]] = {"PCA": []}
    for k in ks:
        axes = pca(train, min(k, *train.shape))
        points["PCA"].append(_point(axes, axes.encode(held_out), held_out))
    for name, model in models.items():
        codes = model.encode(held_out)
        cuts = [largest_codes(codes, min(k, codes.shape[1])) for k in ks] if isinstance(codes, Tensor) else [codes]
        points[name] = [_point(model, cut, held_out) for cut in cuts]
    return points


def _point(model: LinearDictionary, codes: Codes, x: Tensor) -> dict[str, float]:
    return {"l0": l0(codes), "r2": r2(x, model.decode(codes))}


def measure_concepts_of(
    sae: SparseAutoencoder,
    other: SparseAutoencoder,
    images: Tensor,
    texts: Tensor,
    *,
    top: int,
    edges: int,
    seed: int,
    linked: Callable[[ConceptReport, BridgeEdges], float],
    image_labels: Sequence[str],
    text_labels: Sequence[str],
    data: str,
) -> ConceptMeasures:
    """Read the concepts of an autoencoder on held-out pairs.

    Args:
        sae: trained, in eval mode.
        other: trained from another seed.
        images: embeddings (N, d).
        texts: embeddings (N, d), row n belonging to image n.
        top: concepts that count as strong, and as many as weak.
        edges: strongest bridges that are judged.
        seed: of the null.
        linked: says which fraction of edges links what belongs together.
        image_labels: titles by row.
        text_labels: captions by row.
        data: what the embeddings are of, for the record.
    """
    with torch.no_grad():
        atoms, other_atoms = sae.dictionary.cpu(), other.dictionary.cpu()
        device = sae.dictionary.device
        image, text = (_on_cpu(sae.encode(side.to(device))) for side in (images, texts))
    report = measure_concepts(
        image,
        text,
        atoms,
        images=images,
        texts=texts,
        other=other_atoms,
        bridges=edges,
        image_labels=image_labels,
        text_labels=text_labels,
        about={"model": f"{sae.config.kind}, k={sae.config.k:g}", "data": data, "seed": seed},
    )
    meter = BridgeAccumulator(atoms)
    meter.update(image, text)
    matching = match_dictionaries(atoms, other_atoms)
    energy, score = report.energy, report.modality_score
    counts, masses = (
        modality_histogram(score, bins=SCORE_BINS),
        modality_histogram(score, bins=SCORE_BINS, weights=energy),
    )
    assert report.bridges is not None
    assert report.alignment is not None
    assert report.pair_similarity is not None
    cosine = float(report.alignment.nanmedian())
    errors = 100 * (1 - report.probe_accuracy)
    numbers = {
        "stability": matching.stability,
        "stability, strong": energy_stability(matching, energy, top),
        "stability, weak": energy_stability(matching, -energy, top),
        "stability, random": float(
            stability_null(atoms, other_atoms, kind="random", draws=1, generator=seeding.generator(seed, "null")).mean()
        ),
        "energy share": energy_share(energy, top),
        "one modality, concepts": float(counts.fractions[[0, -1]].sum()),
        "one modality, energy": float(masses.fractions[[0, -1]].sum()),
        "cosine to the axis": cosine,
        "degrees to the axis": math.degrees(math.acos(min(1.0, cosine))),
        "errors of the median concept": float(errors.median()),
        "errors of the best concept": float(errors.min()),
        "linked by bridge": linked(report, report.bridges),
        "linked by co-activation": linked(report, bridge_edges(meter.coactivation(), edges)),
        "pair similarity": report.pair_similarity,
        "sum of bridges": float(meter.matrix().sum(dtype=torch.float64)),
    }
    columns = {
        "energy": energy.tolist(),
        "stability": matching.similarity.tolist(),
        "modality score": score.tolist(),
        "score histogram": counts.fractions.tolist(),
        "energy histogram": masses.fractions.tolist(),
    }
    return ConceptMeasures(numbers, columns, report)


def _on_cpu(codes: Codes) -> Codes:
    if isinstance(codes, SparseCodes):
        return SparseCodes(codes.values.cpu(), codes.indices.cpu(), codes.n_concepts)
    return codes.cpu()
