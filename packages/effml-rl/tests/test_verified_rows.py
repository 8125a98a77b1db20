"""Rows worth learning from: what is kept, what is counted, and what a rank contributes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_rl.rollout_batch import RolloutBatch
from effml_rl.verified_rows import VerifiedRows, from_all_ranks


def rollouts() -> RolloutBatch:
    """Return two prompts with three completions each; the second prompt is padded, token 9 ends."""
    completions = torch.tensor([[5, 9, 0], [5, 9, 0], [5, 6, 7], [5, 9, 0], [6, 7, 9], [9, 0, 0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    prompts = torch.tensor([[1, 2]] * 3 + [[0, 2]] * 3)
    truncated = torch.tensor([False, False, True, False, False, False])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    return RolloutBatch(prompts, prompts > 0, completions, mask, truncated, group)


ALL = torch.ones(6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "rows", "duplicates", "too_long"),
    [
        ({}, [0, 3, 4, 5], 1, 0),
        ({"deduplicate": False}, [0, 1, 3, 4, 5], 0, 0),
        ({"keep_truncated": True}, [0, 2, 3, 4, 5], 1, 0),
        ({"max_length": 3}, [3, 5], 0, 3),
    ],
)
def test_what_is_kept(options: dict[str, Any], rows: list[int], duplicates: int, too_long: int) -> None:
    kept, batch = VerifiedRows(**options), rollouts()
    kept.add(batch, ALL)
    assert kept.prompts == [[1, 2] if row < 3 else [2] for row in rows]
    assert kept.completions == [batch.completion_ids[row, batch.completion_mask[row]].tolist() for row in rows]
    metrics = kept.metrics()
    assert (metrics["kept"], metrics["duplicates"], metrics["too_long"]) == (len(rows), duplicates, too_long)
    assert (metrics["verified"], metrics["solved"], metrics["truncated"]) == (1.0, 1.0, pytest.approx(1 / 6))


def test_only_verified_rows_count_as_solved() -> None:
    kept = VerifiedRows()
    kept.add(rollouts(), torch.tensor([False, False, False, True, True, False]))
    kept.add(rollouts(), ~ALL)
    metrics = kept.metrics()
    assert (metrics["kept"], metrics["solved"], metrics["verified"]) == (2, 0.25, pytest.approx(2 / 12))


def test_a_completion_is_kept_once_over_several_calls() -> None:
    kept = VerifiedRows()
    for _ in range(2):
        kept.add(rollouts(), ALL)
    assert len(kept.completions) == 4
    assert kept.metrics()["duplicates"] == 6


def test_without_rows() -> None:
    kept = VerifiedRows()
    assert kept.metrics() == dict.fromkeys(("verified", "truncated", "solved", "kept", "duplicates", "too_long"), 0.0)
    assert from_all_ranks(kept.completions) == []


def test_alone_the_rows_are_ones_own() -> None:
    assert from_all_ranks([[1, 2], [3]]) == [[1, 2], [3]]
