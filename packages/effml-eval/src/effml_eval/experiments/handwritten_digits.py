"""The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels each, with how each is drawn, measured on its pixels.

With ink p(y, x) in [0, 1], means and (co)variances over the ink, y downwards:

    stroke = 2 sum p / sum |grad p|      pixels: a stroke of width w and length L has ink w L and two sides of length L
    slant = atan(-cov(x, y) / var(y))    degrees, positive where the top lies to the right
    width = sqrt(12 (var(x) - cov(x, y)^2 / var(y)))      pixels: of a bar that spreads as the digit does, set upright

A *fact* is one thing that can be said of a digit: which one it is, thin or thick, leaning, upright, narrow or wide.
What lies between thin and thick, or narrow and wide, is not remarkable. The limits are fixed numbers near the data's
thirds, so that the facts of an image depend on that image alone.

Source: E. Alpaydin, C. Kaynak, "Optical recognition of handwritten digits", UCI; its test set, as scikit-learn bundles
it. The facts are ours; the slant by moments is a usual measure.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["FACTS", "Digits", "Drawing", "drawing", "facts_of", "load_digits"]

FACTS = (*map(str, range(10)), "thin", "thick", "leaning left", "upright", "leaning right", "narrow", "wide")
"""Names of the facts, in the order of their columns."""

STROKES = (1.4, 1.55)  # pixels: thin below, thick above
SLANTS = (-6.0, 2.0)  # degrees: left below, right above, upright between
WIDTHS = (4.0, 4.5)  # pixels: narrow below, wide above


class Drawing(NamedTuple):
    """How digits are drawn, each (N) float64.

    Fields:
        stroke: width of the strokes, pixels.
        slant: degrees, positive to the right.
        width: pixels.
    """

    stroke: Tensor
    slant: Tensor
    width: Tensor


class Digits(NamedTuple):
    """Images and what is true of them.

    Fields:
        pixels: (N, 8, 8) float64, ink in [0, 1].
        digits: (N) int64, 0 to 9.
        facts: (N, facts) bool, columns as in `FACTS`.
    """

    pixels: Tensor
    digits: Tensor
    facts: Tensor


def load_digits() -> Digits:
    """Return all images, from the installed scikit-learn."""
    from sklearn.datasets import load_digits as read

    data = read()
    pixels, digits = torch.from_numpy(data.images / 16.0), torch.from_numpy(data.target).long()
    return Digits(pixels, digits, facts_of(digits, drawing(pixels)))


def drawing(pixels: Tensor) -> Drawing:
    """Measure images (N, H, W) float64 with ink on more than one row.

    >>> upright = torch.zeros(1, 8, 8, dtype=torch.float64)
    >>> upright[:, :, 3:5] = 1.0
    >>> how = drawing(upright)
    >>> round(float(how.stroke), 2), round(float(how.width), 2)
    (1.65, 1.73)
    """
    mass = pixels.sum((1, 2))
    down, across = (pixels.sum(axis) / mass[:, None] for axis in (2, 1))
    y, x = (_deviations(share) for share in (down, across))
    var_y, var_x = (down * y**2).sum(1), (across * x**2).sum(1)
    cov = torch.einsum("nij,ni,nj->n", pixels, y, x) / mass
    framed = pad(pixels, (1, 1, 1, 1))
    corner = framed[:, :-1, :-1]
    sides = torch.hypot(framed[:, :-1, 1:] - corner, framed[:, 1:, :-1] - corner).sum((1, 2))
    slant = torch.atan(-cov / var_y) * (180 / math.pi)
    return Drawing(2 * mass / sides, slant, (12 * (var_x - cov**2 / var_y)).clamp_min(0.0).sqrt())


def _deviations(share: Tensor) -> Tensor:
    places = torch.arange(share.shape[1], dtype=share.dtype)
    return places - (share @ places)[:, None]


def facts_of(digits: Tensor, how: Drawing) -> Tensor:
    """Return which facts hold, (N, facts) bool."""
    left, right = how.slant < SLANTS[0], how.slant > SLANTS[1]
    columns = [how.stroke < STROKES[0], how.stroke > STROKES[1], left, ~(left | right), right]
    columns += [how.width < WIDTHS[0], how.width > WIDTHS[1]]
    return torch.cat([digits[:, None] == torch.arange(10), torch.stack(columns, 1)], 1)
