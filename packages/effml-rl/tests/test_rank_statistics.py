"""Statistics over ranks, in one process: what the plain functions give. Several ranks: test_policy_step."""

from __future__ import annotations

import pytest
import torch
from effml_rl.gae import whiten as plain_whiten
from effml_rl.rank_statistics import RankRows, means, whiten
from effml_shared.errors import ConfigError


def test_whitening_is_the_plain_one() -> None:
    values = torch.randn(5, 7, dtype=torch.float64) * 3 + 2
    mask = torch.rand(5, 7) < 0.6
    expected = plain_whiten(values, mask)
    torch.testing.assert_close(whiten(values.masked_fill(~mask, torch.nan), mask), expected, atol=1e-12, rtol=0)


def test_whitening_few_tokens() -> None:
    mask = torch.zeros(2, 2, dtype=torch.bool)
    assert whiten(torch.ones(2, 2), mask).eq(0).all()
    mask[0, 0] = True
    with pytest.raises(ConfigError, match=r"mask: got a single counted token"):
        whiten(torch.ones(2, 2), mask)
    mask[0, 1] = True
    assert whiten(torch.full((2, 2), 0.5), mask).eq(0).all()


def test_rows_of_one_rank_are_all_rows() -> None:
    ranks, values = RankRows(3), torch.tensor([[1.0], [torch.nan], [2.0]])
    assert (ranks.start, ranks.total) == (0, 3)
    torch.testing.assert_close(ranks.own(ranks.gather(values)), values, equal_nan=True)


def test_means() -> None:
    assert means({"a": (3.0, 2.0), "b": (0.0, 0.0)}) == {"a": 1.5, "b": 0.0}
    assert means({}) == {}
