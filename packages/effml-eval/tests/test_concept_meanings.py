from __future__ import annotations

import math

import pytest
import torch
from effml_eval.concepts.bridge import BridgeEdges
from effml_eval.experiments.concept_meanings import LEVEL, NONE, meanings, same_meaning
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor


def _tail(rows: int, holders: int, draws: int, found: int) -> float:
    """P(at least `found` of `draws` rows without replacement are holders), by counting."""
    ways = sum(math.comb(holders, x) * math.comb(rows - holders, draws - x) for x in range(found, draws + 1))
    return ways / math.comb(rows, draws)


@given(
    st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=6, max_size=24),
    st.integers(0, 6),
)
def test_a_meaning_is_the_fact_that_is_least_likely_by_chance(rows: list[list[bool]], count: int) -> None:
    facts = torch.tensor(rows)
    top = torch.tensor([[*range(count), *[-1] * (6 - count)]])
    chances = []
    for fact in range(3):
        holders, found = int(facts[:, fact].sum()), int(facts[:count, fact].sum())
        chances.append(_tail(len(rows), holders, count, found))
    meaning = int(meanings(top, facts))
    if min(chances) * 3 < LEVEL * (1 - 1e-9):
        assert meaning != NONE
        assert chances[meaning] == pytest.approx(min(chances), rel=1e-9)
    elif min(chances) * 3 > LEVEL * (1 + 1e-9):
        assert meaning == NONE


def test_what_is_true_of_all_or_of_none_means_nothing() -> None:
    facts = torch.tensor([[True, False]]).expand(200, -1)
    assert meanings(torch.arange(8)[None], facts).tolist() == [NONE]


def test_a_concept_that_never_fires_means_nothing() -> None:
    assert meanings(torch.full((2, 4), -1), torch.eye(9, dtype=torch.bool)).tolist() == [NONE, NONE]


def test_no_more_chance_meanings_than_the_level_allows() -> None:
    draws = torch.Generator().manual_seed(0)
    facts = torch.rand(500, 17, generator=draws) < 0.3
    top = torch.stack([torch.randperm(500, generator=draws)[:8] for _ in range(4000)])
    assert float((meanings(top, facts) != NONE).double().mean()) < LEVEL


def test_edges_of_the_same_meaning_count_and_those_without_any_do_not() -> None:
    image, text = torch.tensor([0, 1, NONE]), torch.tensor([0, 0, NONE])

    def edges(*pairs: tuple[int, int]) -> BridgeEdges:
        ends: Tensor = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2)
        return BridgeEdges(ends[:, 0], ends[:, 1], torch.ones(len(ends)))

    assert same_meaning(image, text, edges((0, 0), (0, 1), (1, 0), (2, 2))) == 0.5
    assert math.isnan(same_meaning(image, text, edges()))


def test_facts_that_do_not_fit_are_refused() -> None:
    for facts in (torch.ones(3, 2, dtype=torch.bool), torch.ones(3, dtype=torch.bool), torch.ones(9, 0)):
        with pytest.raises(ConfigError, match=r"^facts: got shape"):
            meanings(torch.tensor([[5]]), facts)
