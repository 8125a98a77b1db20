from __future__ import annotations

import itertools

import pytest
import torch
from effml_eval.concepts.matching import Matching, match_dictionaries
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def _atoms(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _best(a: Tensor, b: Tensor) -> float:
    """Try every one-to-one assignment of the fewer atoms."""
    s = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    s = s if len(a) <= len(b) else s.T
    few, many = s.shape
    return max(float(s[range(few), list(p)].mean()) for p in itertools.permutations(range(many), few))


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10_000), st.booleans())
def test_it_is_the_best_of_all_assignments(count: int, others: int, dim: int, seed: int, among: bool) -> None:
    # With every atom among the candidates, the sparse form is exact too.
    a, b = _atoms(count, dim, seed), _atoms(others, dim, seed + 1)
    matching = match_dictionaries(a, b, rectangular=True, exact_up_to=0 if among else 8192)
    assert matching.stability == pytest.approx(_best(a, b), abs=1e-9)
    assert matching.exact is not among
    assert matching.upper_bound >= matching.stability - 1e-9
    used = [j for j in matching.partner.tolist() if j >= 0]
    assert len(used) == len(set(used)) == min(count, others)
    assert torch.equal(matching.similarity.isnan(), matching.partner < 0)


def test_a_greedy_choice_would_lose() -> None:
    # Unit atoms a1, a2, b1, b2 of cosines [[.9, .8], [.8, .1]] between the pairs and .6 within them.
    gram = torch.tensor([[1, 0.6, 0.9, 0.8], [0.6, 1, 0.8, 0.1], [0.9, 0.8, 1, 0.6], [0.8, 0.1, 0.6, 1]]).double()
    atoms = torch.linalg.cholesky(gram)
    matching = match_dictionaries(atoms[:2], atoms[2:])
    assert matching.partner.tolist() == [1, 0]
    assert matching.stability == pytest.approx(0.8)


def test_candidates_lose_little_and_the_bound_says_so() -> None:
    a = _atoms(60, 8, 0)
    b = (a + 0.3 * _atoms(60, 8, 1))[torch.randperm(60, generator=torch.Generator().manual_seed(2))]
    exact, among = match_dictionaries(a, b), match_dictionaries(a, b, exact_up_to=10, candidates=3)
    assert exact.exact
    assert not among.exact
    assert exact.stability - 0.02 <= among.stability <= exact.stability + 1e-12
    assert among.upper_bound >= exact.stability
    assert sorted(among.partner.tolist()) == list(range(60))


@pytest.mark.parametrize("candidates", [1, 2])
def test_a_graph_of_candidates_without_a_full_matching_is_completed(candidates: int) -> None:
    # All of A points one way, to which one atom of B is nearest: the nearest neighbours alone match one atom.
    a = torch.eye(6)[:1].repeat(6, 1) + 0.01 * _atoms(6, 6, 0)
    matching = match_dictionaries(a, torch.eye(6), exact_up_to=0, candidates=candidates)
    assert sorted(matching.partner.tolist()) == list(range(6))
    wide = match_dictionaries(torch.cat([a, a]), torch.eye(6), exact_up_to=0, candidates=candidates, rectangular=True)
    assert int((wide.partner < 0).sum()) == 6


def test_ties_are_settled_in_one_way() -> None:
    same = torch.ones(5, 3)
    assert len({tuple(match_dictionaries(same, same).partner.tolist()) for _ in range(3)}) == 1


def test_half_precision_and_mixed_types_are_computed_wide() -> None:
    a = _atoms(20, 16, 0)
    matching = match_dictionaries(a.half(), a.bfloat16())
    assert matching.similarity.dtype == torch.float32
    assert matching.partner.tolist() == list(range(20))
    assert isinstance(matching, Matching)


def test_errors() -> None:
    square = torch.eye(3)
    for bad, message in (
        (torch.eye(3)[:2], r"^b: got 2 atoms beside 3, expected as many; rectangular=True"),
        (torch.ones(3, 4), r"^b: got atoms of 4 dimensions beside 3"),
        (torch.zeros(3, 3), r"^b: got 3 atoms of norm 0, the first at 0"),
        (square * torch.nan, r"^b: got 9 of 9 numbers NaN or infinite"),
    ):
        with pytest.raises(ConfigError, match=message):
            match_dictionaries(square, bad)
    with pytest.raises(ConfigError, match=r"^a, b: got 0 and 0 atoms"):
        match_dictionaries(torch.zeros(0, 3), torch.zeros(0, 3))
    with pytest.raises(ConfigError, match=r"^candidates: got 0"):
        match_dictionaries(square, square, candidates=0)
