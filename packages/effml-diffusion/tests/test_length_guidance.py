from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from effml_diffusion.flex.length_guidance import LengthGuidance
from effml_shared.errors import ConfigError

GAPS = torch.tensor([[1.0, 2.0, 5.0], [0.0, 0.0, 5.0]])
OPEN = torch.tensor([[True, True, False], [True, True, False]])
LENGTHS = torch.tensor([2, 2])


def test_without_wishes_only_open_gaps_are_left() -> None:
    bent = LengthGuidance().bend(GAPS, LENGTHS, OPEN)
    assert bent.tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 0.0]]


def test_a_tilt_multiplies() -> None:
    bent = LengthGuidance(tilt=math.log(2.0)).bend(GAPS, LENGTHS, OPEN)
    torch.testing.assert_close(bent[0], torch.tensor([2.0, 4.0, 0.0]))


def test_bounds_scale_the_total_and_fill_evenly_where_nothing_is_expected() -> None:
    assert LengthGuidance(target=8).bend(GAPS, LENGTHS, OPEN).tolist() == [[2.0, 4.0, 0.0], [3.0, 3.0, 0.0]]
    assert LengthGuidance(minimum=4).bend(GAPS, LENGTHS, OPEN).tolist() == [[1.0, 2.0, 0.0], [1.0, 1.0, 0.0]]
    shorter = LengthGuidance(maximum=torch.tensor([3, 9])).bend(GAPS, LENGTHS, OPEN)
    torch.testing.assert_close(shorter, torch.tensor([[1 / 3, 2 / 3, 0.0], [0.0, 0.0, 0.0]]))
    assert not LengthGuidance(target=1).bend(GAPS, LENGTHS, OPEN).any()  # too long already
    assert LengthGuidance(minimum=4).bend(GAPS, LENGTHS, torch.zeros_like(OPEN)).sum() == 0


def test_what_is_missing_at_least_and_at_most() -> None:
    lengths = torch.tensor([1, 5, 9])
    low, high = LengthGuidance(minimum=4, maximum=torch.tensor([6, 7, 8])).missing(lengths, 100)
    assert low.tolist() == [3, 0, 0]
    assert high.tolist() == [5, 2, 0]
    low, high = LengthGuidance().missing(lengths, 8)
    assert (low.tolist(), high.tolist()) == ([0, 0, 0], [7, 3, 0])
    low, high = LengthGuidance(target=torch.tensor([4, 6, 9])).missing(lengths, 100)
    assert low.tolist() == high.tolist() == [3, 1, 0]
    with pytest.raises(ConfigError, match=r"minimum: got 9, expected at most max_length, 8"):
        LengthGuidance(minimum=9).missing(lengths, 8)
    with pytest.raises(ConfigError, match=r"maximum: got 2 numbers, expected one for each of 3 rows"):
        LengthGuidance(maximum=torch.tensor([5, 6])).missing(lengths, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tilt": math.nan}, r"tilt: got nan"),
        ({"target": 3, "minimum": 3}, r"target: got a minimum or a maximum beside it"),
        ({"minimum": -1}, r"minimum: got -1"),
        ({"target": torch.tensor([1, -2])}, r"target: got tensor"),
        ({"target": 2.5}, r"target: got 2.5, expected a whole number"),
        ({"minimum": 5, "maximum": 4}, r"minimum: got 5, expected at most the maximum, 4"),
        ({"minimum": 5, "maximum": torch.tensor([4, 9])}, r"minimum: got 5, expected at most the maximum"),
    ],
)
def test_wrong_wishes(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LengthGuidance(**arguments)
