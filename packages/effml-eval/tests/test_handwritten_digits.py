from __future__ import annotations

import math

import pytest
import torch
from effml_eval.experiments.handwritten_digits import FACTS, Drawing, drawing, facts_of, load_digits
from torch import Tensor


def _bar(width: int, height: int = 6, left: int = 2) -> Tensor:
    image = torch.zeros(1, 8, 8, dtype=torch.float64)
    image[:, 1 : 1 + height, left : left + width] = 1.0
    return image


def test_a_bar_is_measured_by_hand() -> None:
    how = drawing(_bar(3, height=5))
    sides = (5 + 3) * 2 - 2 + math.sqrt(2)  # at one corner the differences along x and y meet
    assert float(how.stroke) == pytest.approx(2 * 15 / sides, rel=1e-12)
    assert float(how.slant) == pytest.approx(0.0, abs=1e-12)
    assert float(how.width) == pytest.approx(math.sqrt(12 * 2 / 3), rel=1e-12)  # columns -1, 0, 1: variance 2/3


def test_a_diagonal_leans_by_45_degrees_and_has_no_width() -> None:
    rising = torch.eye(8, dtype=torch.float64).flip(1)[None]
    assert float(drawing(rising).slant) == pytest.approx(45.0)
    assert float(drawing(rising.flip(2)).slant) == pytest.approx(-45.0)
    assert float(drawing(rising).width) == pytest.approx(0.0, abs=1e-6)


def test_measures_do_not_depend_on_place_or_darkness_and_a_mirror_turns_the_slant() -> None:
    pixels = load_digits().pixels[:50]
    how = drawing(pixels)
    framed = drawing(torch.nn.functional.pad(pixels, (2, 1, 0, 3)))
    for plain, other in ((how, framed), (how, drawing(0.25 * pixels))):
        for mine, theirs in zip(plain, other, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(drawing(pixels.flip(2)).slant, -how.slant, rtol=1e-9, atol=1e-9)


def test_thicker_and_wider_is_measured_so() -> None:
    strokes = [float(drawing(_bar(width)).stroke) for width in (1, 2, 3)]
    widths = [float(drawing(_bar(width)).width) for width in (2, 3, 4)]
    assert strokes == sorted(strokes)
    assert widths == sorted(widths)


def test_facts_are_those_of_the_limits() -> None:
    how = Drawing(*(torch.tensor(column) for column in ([1.2, 1.5, 1.8], [-9.0, 0.0, 9.0], [3.0, 4.2, 5.0])))
    rows = facts_of(torch.tensor([7, 0, 1]), how).tolist()
    said = [[name for name, holds in zip(FACTS, row, strict=True) if holds] for row in rows]
    assert said == [
        ["7", "thin", "leaning left", "narrow"],
        ["0", "upright"],
        ["1", "thick", "leaning right", "wide"],
    ]


def test_the_data_are_whole_and_every_remarkable_fact_is_true_of_a_third_or_so() -> None:
    digits = load_digits()
    assert digits.pixels.shape == (1797, 8, 8)
    assert digits.pixels.dtype == torch.float64
    assert [float(digits.pixels.min()), float(digits.pixels.max())] == [0.0, 1.0]
    assert torch.equal(digits.facts[:, :10].long().argmax(1), digits.digits)
    assert (digits.facts[:, :10].sum(1) == 1).all()
    assert (digits.facts[:, 12:15].sum(1) == 1).all()
    assert (digits.facts[:, 10:12].sum(1) <= 1).all()
    assert (digits.facts[:, 15:].sum(1) <= 1).all()
    share = digits.facts[:, 10:].double().mean(0)
    assert share.min() > 0.25
    assert share.max() < 0.45
