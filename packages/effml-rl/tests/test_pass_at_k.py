"""pass@k against the binomial coefficients and against all subsets; votes with ties, tolerance and no answers."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from effml_rl.pass_at_k import coverage, majority_at_k, pass_at_k
from effml_shared.errors import ConfigError


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (5, 2, 2, 0.7),
        (10, 3, 5, 0.916667),
        (64, 1, 32, 0.5),
        (64, 2, 32, 0.753968),
        (64, 63, 2, 1.0),
        (200, 5, 100, 0.970308),
        (128, 3, 16, 0.332349),
        (10000, 10, 1000, 0.651496),
    ],
)
def test_known_values(n: int, c: int, k: int, expected: float) -> None:
    got = pass_at_k(n, c, k).item()
    assert abs(got - expected) < 1e-6
    assert abs(got - float(1 - Fraction(math.comb(n - c, k), math.comb(n, k)))) < 1e-12


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_equals_the_share_of_subsets(n: int) -> None:
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        expected = [sum(min(chosen) < c for chosen in subsets) / len(subsets) for c in range(n + 1)]
        got = pass_at_k(n, range(n + 1), k)
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_shapes_and_problems_with_different_n() -> None:
    counts = torch.tensor([[0, 1], [3, 4]])
    torch.testing.assert_close(pass_at_k(4, counts, 1), counts.double() / 4)
    mixed = pass_at_k(torch.tensor([5, 10, 64]), torch.tensor([2, 3, 2]), 2)
    expected = [pass_at_k(n, c, 2).item() for n, c in ((5, 2), (10, 3), (64, 2))]
    assert mixed.tolist() == expected
    assert abs(pass_at_k(128, [0, 1, 3, 128], 16).mean().item() - 0.364337) < 1e-6
    assert pass_at_k(4, torch.zeros(0, dtype=torch.int64), 2).shape == (0,)


@pytest.mark.parametrize(
    ("n", "c", "k"),
    [(4, 2, 5), (4, 5, 2), (4, -1, 2), (4, 2, 0), (4, 2, 1.5), (4.0, 2, 1), (4, 0.5, 1), (0, 0, 1)],
)
def test_bad_counts_are_named(n: int, c: int, k: int) -> None:
    with pytest.raises(ConfigError, match=r"^(n, correct|k)\b"):
        pass_at_k(n, c, k)
    with pytest.raises(ConfigError, match=r"one for each problem"):
        pass_at_k(torch.tensor([4, 4]), torch.tensor([1, 1, 1]), 1)


def test_coverage() -> None:
    assert coverage([0, 1, 3, 128]) == 0.75
    assert coverage(torch.tensor([0, 1, 3, 128]), more_than=2) == 0.5
    assert coverage([1, 0, 2]) == pytest.approx(pass_at_k(4, [1, 0, 2], 4).mean().item())
    with pytest.raises(ConfigError, match=r"no problems"):
        coverage([])


def test_the_commonest_answer_wins_and_ties_go_to_the_first() -> None:
    assert majority_at_k([3, 5, 5, 3, 5], 5) == 1.0
    assert majority_at_k([3, 5, 5, 3], 5) == 0.0
    assert majority_at_k([3, 5, 5, 3], 3) == 1.0
    assert majority_at_k([5, 3, 3], 5, k=1) == 1.0
    assert majority_at_k(["wrong"] * 33 + ["right"] * 31, "right") == 0.0


def test_unparseable_answers_do_not_vote() -> None:
    assert majority_at_k([None, None, None, 7], 7) == 1.0
    assert majority_at_k([None, None], 7) == 0.0


def test_equality_is_the_verifiers() -> None:
    assert majority_at_k([0.5, Fraction(1, 2), 3], Fraction(1, 2)) == 1.0
    assert majority_at_k(["1/2", "0.5", "3"], "0.5") == 0.0

    def near(answer: float, reference: float) -> bool:
        return abs(answer - reference) <= 1.0

    # 0, 1, 2 in steps of the tolerance: 2 is near 1, but not near the first member of that class
    assert majority_at_k([0.0, 1.0, 2.0, 5.0, 5.1], 0.5, equal=near) == 1.0
    assert majority_at_k([0.0, 2.0, 1.0, 5.0, 5.1, 5.2], 0.5, equal=near) == 0.0


def test_average_over_subsets() -> None:
    answers = ["a", "a", "b", None]
    exact = sum(majority_at_k([answers[i] for i in s], "a") for s in itertools.combinations(range(4), 2)) / 6
    generator = torch.Generator().manual_seed(0)
    got = majority_at_k(answers, "a", k=2, subsets=2000, generator=generator)
    assert abs(got - exact) < 4 * math.sqrt(exact * (1 - exact) / 2000)
    assert majority_at_k(answers, "a", k=4, subsets=3) == 1.0


def test_bad_votes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"k: got 3, expected at most"):
        majority_at_k([1, 2], 1, k=3)
    with pytest.raises(ConfigError, match=r"k: got 0"):
        majority_at_k([], 1)
    with pytest.raises(ConfigError, match=r"gold"):
        majority_at_k([1], None)
    with pytest.raises(ConfigError, match=r"subsets"):
        majority_at_k([1], 1, subsets=0)
