"""How well each concept alone tells the modalities apart: balanced accuracy of its best threshold, exactly.

A rule "image if z > t" (or "text if z > t") has balanced accuracy 1/2 + (F_text(t) - F_image(t)) / 2 with the
cumulative distributions F of the concept's code by modality. So the best over all t and both rules is

    1/2 + max_t |F_text(t) - F_image(t)| / 2          half of it the Kolmogorov-Smirnov distance

found by one sort of the codes per concept, in integers: no grid of thresholds, no rounding. Chance is 1/2; the best of
many thresholds on few rows is above it by itself. Cost: a sort of all non-zero entries; inactive rows enter as one
number per concept, so sparse codes stay sparse. Source: arXiv 2504.11695 reports such accuracies; this form is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from effml_shared.errors import ConfigError
from torch import Tensor

from effml_eval.concepts.code_entries import Codes, Entries, check_codes, concept_blocks, n_concepts_of

__all__ = ["ModalityProbe", "modality_probe"]


class ModalityProbe(NamedTuple):
    """The best threshold rule of every concept.

    Fields:
        accuracy: (C) float64, balanced, in [0.5, 1].
        threshold: (C); the rule asks whether z is above it.
        image_above: (C) bool, above means image; otherwise, text.
    """

    accuracy: Tensor
    threshold: Tensor
    image_above: Tensor


def modality_probe(image_codes: Codes, text_codes: Codes) -> ModalityProbe:
    """Fit a threshold per concept on codes, or on projections <x, d_i> as a dense matrix of codes.

    Args:
        image_codes: (N, C).
        text_codes: (M, C).

    Raises:
        ConfigError: a set is empty or not finite, or they differ in concepts.

    >>> probe = modality_probe(torch.tensor([[2.0, 1.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    >>> probe.accuracy.tolist(), probe.threshold.tolist(), probe.image_above.tolist()
    ([1.0, 0.5], [1.0, 0.0], [True, True])
    """
    images = check_codes("image_codes", image_codes)
    texts = check_codes("text_codes", text_codes, n_concepts_of(image_codes))
    if not images or not texts:
        raise ConfigError(f"image_codes, text_codes: got {images} and {texts} rows, expected at least one each")
    found = [
        _fit(stop - start, image, text, images, texts)
        for start, stop, (image, text) in concept_blocks(image_codes, text_codes)
    ]
    return ModalityProbe(*(torch.cat(column) for column in zip(*found, strict=True)))


def _fit(n_concepts: int, image: Entries, text: Entries, images: int, texts: int) -> ModalityProbe:
    """Weigh every image by the number of texts and the reverse: the weights of a concept add up to 0, in integers."""
    device = image.values.device
    inactive_images = images - image.concepts.bincount(minlength=n_concepts)
    inactive_texts = texts - text.concepts.bincount(minlength=n_concepts)
    concepts = torch.cat([image.concepts, text.concepts, torch.arange(n_concepts, device=device)])
    values = torch.cat([image.values, text.values.to(image.values), image.values.new_zeros(n_concepts)])
    weights = torch.cat(
        [
            torch.full_like(image.concepts, -texts),
            torch.full_like(text.concepts, images),
            inactive_texts * images - inactive_images * texts,
        ]
    )
    order = values.argsort()
    order = order[concepts[order].argsort(stable=True)]
    concepts, values = concepts[order], values[order]
    gap = weights[order].cumsum(0)  # texts x images x (F_text - F_image) at each value, restarting at 0 by itself
    last = torch.ones_like(concepts, dtype=torch.bool)  # of equal values of a concept: a threshold cannot part them
    last[:-1] = (concepts[1:] != concepts[:-1]) | (values[1:] != values[:-1])
    concepts, values, gap = concepts[last], values[last], gap[last]
    best = gap.abs().argsort(descending=True, stable=True)  # of equally good thresholds the lowest
    best = best[concepts[best].argsort(stable=True)]
    counts = concepts.bincount(minlength=n_concepts)
    place = best[counts.cumsum(0) - counts]
    accuracy = 0.5 + gap[place].abs().double() / (2 * images * texts)
    return ModalityProbe(accuracy, values[place], gap[place] >= 0)
