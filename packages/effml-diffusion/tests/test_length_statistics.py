from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from effml_diffusion.flex.length_statistics import length_statistics
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st


def test_by_hand() -> None:
    found = length_statistics([2, 2, 2, 5], torch.tensor([2, 5]))
    p, q = (1.5 / 3, 1.5 / 3), (3.5 / 5, 1.5 / 5)
    assert found.kl == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    assert found.tv == pytest.approx(0.25)
    assert found.wasserstein == pytest.approx(0.25 * 3)
    assert (found.mean, found.reference_mean) == (2.75, 3.5)
    assert found.std == pytest.approx(1.5)
    assert found.reference_std == pytest.approx(math.sqrt(4.5))


def test_bins() -> None:
    assert length_statistics([0, 9], [1, 8], bin_width=4).tv == 0
    assert length_statistics([0, 9], [1, 8]).tv == 1
    assert length_statistics([0, 9], [1, 8], bin_width=4).wasserstein == 1.0  # of lengths, not of bins


lengths = st.lists(st.integers(0, 30), min_size=1, max_size=12)


@settings(deadline=None)
@given(lengths, lengths)
def test_distances_equal_their_definitions(ours: list[int], theirs: list[int]) -> None:
    found = length_statistics(ours, theirs)
    cumulative = lambda values, at: sum(value <= at for value in values) / len(values)  # noqa: E731
    expected = sum(abs(cumulative(ours, at) - cumulative(theirs, at)) for at in range(31))
    assert found.wasserstein == pytest.approx(expected)
    shares = [abs(ours.count(n) / len(ours) - theirs.count(n) / len(theirs)) / 2 for n in range(31)]
    assert found.tv == pytest.approx(sum(shares))
    assert found.kl >= 0
    assert length_statistics(ours, ours).kl == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("wrong", [[], [-1], torch.ones(2), torch.ones(2, 2, dtype=torch.int64)])
def test_wrong_lengths(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"reference: got"):
        length_statistics([1], wrong)
    with pytest.raises(ConfigError, match=r"generated: got"):
        length_statistics(wrong, [1])
    with pytest.raises(ConfigError, match=r"bin_width: got 0"):
        length_statistics([1], [1], bin_width=0)
