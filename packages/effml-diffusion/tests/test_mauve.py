"""The divergence frontier against its closed forms, and clusters that are plain to see."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from effml_diffusion.mauve import frontier_area, k_means, mauve_score
from effml_shared.errors import ConfigError
from torch import Tensor


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_equal_and_disjoint_histograms() -> None:
    p = torch.tensor([3.0, 1.0, 0.0])
    assert frontier_area(p, 2 * p) == pytest.approx(1.0)
    disjoint = torch.tensor([0.0, 0.0, 5.0])
    beta = math.gamma(5) * math.gamma(6) / math.gamma(11)
    assert frontier_area(p, disjoint, points=4000) == pytest.approx(5 * beta, rel=1e-4)
    assert frontier_area(p, disjoint, points=4000, scaling=1.0) == pytest.approx(0.5, rel=1e-4)


def test_area_is_symmetric_and_falls_with_the_distance() -> None:
    p = torch.tensor([0.5, 0.3, 0.2])
    areas = [frontier_area(p, p.lerp(torch.tensor([0.1, 0.1, 0.8]), step)) for step in (0.0, 0.3, 0.6, 1.0)]
    assert areas == sorted(areas, reverse=True)
    q = torch.tensor([0.1, 0.1, 0.8])
    assert frontier_area(p, q) == pytest.approx(frontier_area(q, p), rel=1e-9)


def test_area_by_hand() -> None:
    p, q = torch.tensor([0.9, 0.1]).double(), torch.tensor([0.2, 0.8]).double()
    r = (p + q) / 2
    x = math.exp(-5 * float((q * (q / r).log()).sum()))
    y = math.exp(-5 * float((p * (p / r).log()).sum()))
    ends = math.exp(-5 * float((q * (q / p).log()).sum())), math.exp(-5 * float((p * (p / q).log()).sum()))
    corners = [(0.0, 1.0), (ends[0], 1.0), (x, y), (1.0, ends[1]), (1.0, 0.0)]
    expected = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(corners))
    assert frontier_area(p, q, points=3) == pytest.approx(expected, abs=1e-4)


def test_clusters_that_are_plain_to_see_are_found() -> None:
    centres = 10 * torch.eye(4, dtype=torch.float64)
    points = (centres[:, None] + 0.1 * normal(0, 4, 25, 4)).flatten(0, 1)
    labels = k_means(points, 4, generator=torch.Generator().manual_seed(0)).view(4, 25)
    assert bool((labels == labels[:, :1]).all())
    assert sorted(labels[:, 0].tolist()) == [0, 1, 2, 3]
    again = k_means(points, 4, generator=torch.Generator().manual_seed(0)).view(4, 25)
    assert torch.equal(labels, again)


def test_more_clusters_than_different_points() -> None:
    assert len(k_means(torch.ones(5, 2), 3)) == 5
    assert mauve_score(torch.ones(5, 2), torch.ones(5, 2), clusters=3) == pytest.approx(1.0)


def test_scores_tell_alike_from_different() -> None:
    generator = torch.Generator().manual_seed(0)
    real, like, shifted = normal(1, 300, 4), normal(2, 300, 4), normal(3, 300, 4) + 1
    far = normal(4, 300, 4) + 50
    scores = [mauve_score(real, x, clusters=8, generator=generator) for x in (like, shifted, far)]
    assert 0.9 < scores[0] <= 1
    assert scores[0] - 0.2 > scores[1] > scores[2]
    assert scores[2] < 0.3


def test_bad_input_is_refused() -> None:
    p = torch.ones(3)
    for first, second, message in (
        (p, p[:2], r"q: got shape \(2,\), expected that of p, \(3,\)"),
        (p, -p, r"q: got negative numbers"),
        (0 * p, p, r"p: got negative numbers"),
        (p * math.nan, p, r"p: got negative numbers, NaN"),
    ):
        with pytest.raises(ConfigError, match=message):
            frontier_area(first, second)
    features = normal(0, 6, 3)
    with pytest.raises(ConfigError, match=r"generated: got shape \(6, 2\)"):
        mauve_score(features, features[:, :2])
    with pytest.raises(ConfigError, match=r"real: got shape \(0, 3\)"):
        mauve_score(features[:0], features)
    with pytest.raises(ConfigError, match=r"real: got shape \(6, 3\)"):
        mauve_score(features * math.inf, features)
    with pytest.raises(ConfigError, match=r"clusters: got 99 for 12 points"):
        mauve_score(features, features, clusters=99)
