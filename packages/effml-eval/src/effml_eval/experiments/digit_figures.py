"""What `eval.digits` shows besides what all experiments on concepts do: the strongest bridges, as images and words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from effml_eval.experiments import sae_figures
from effml_eval.experiments.handwritten_digits import load_digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["figures"]


def figures(rows: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Figure]:
    """Draw the plots of a finished run from its summary."""
    from matplotlib.figure import Figure

    drawn = sae_figures.figures(rows, summary)
    examples = summary.get("columns", {}).get("examples", [])
    if not examples:
        return drawn
    bridges = Figure(figsize=(7.5, 0.25 + 0.62 * len(examples)), layout="constrained")
    _draw_examples(bridges, examples)
    caption = (
        "Strongest bridges of the first seed: images of the one concept, captions of the other (one each per concept)"
    )
    return {**drawn, caption: bridges}


def _draw_examples(figure: Figure, examples: list[dict[str, Any]]) -> None:
    pixels = load_digits().pixels
    axes = figure.subplots(len(examples), 2, squeeze=False, width_ratios=[1, 1.6])
    for (left, right), example in zip(axes, examples, strict=True):
        images = [torch.nn.functional.pad(pixels[row], (0, 1)) for row in example["images"]]
        left.imshow(torch.cat(images, 1).numpy(), cmap="Greys", vmin=0.0, vmax=1.0)
        ends = f"{example['image']} → {example['text']}"
        left.set_ylabel(ends, rotation=0, ha="right", va="center", fontsize=7)
        left.set(xticks=[], yticks=[])
        left.spines[:].set_visible(False)
        right.text(0.0, 0.5, "\n".join(example["captions"]), fontsize=7, va="center", transform=right.transAxes)
        right.set_axis_off()
