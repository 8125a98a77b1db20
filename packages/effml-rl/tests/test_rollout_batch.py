"""Rollouts: where completions end, the record's own checks, cutting and joining."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from effml_rl.rollout_batch import RolloutBatch, completion_mask
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

EOS = 2


def rollouts(rows: int = 4, prompt: int = 3, completion: int = 5, seed: int = 0) -> RolloutBatch:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, prompt + 1, (rows, 1), generator=generator)
    ids = torch.randint(0, 6, (rows, completion), generator=generator)
    mask, truncated = completion_mask(ids, EOS)
    return RolloutBatch(
        prompt_ids=torch.randint(3, 9, (rows, prompt), generator=generator),
        prompt_mask=torch.arange(prompt) >= prompt - lengths,
        completion_ids=ids,
        completion_mask=mask,
        truncated=truncated,
        group_index=torch.arange(rows) // 2,
        sampler_logps=-torch.rand(rows, completion, generator=generator),
    )


def same(left: RolloutBatch, right: RolloutBatch) -> bool:
    pairs = zip(left.tensors().items(), right.tensors().items(), strict=True)
    return all(a == b and x.equal(y) for (a, x), (b, y) in pairs)


def test_the_end_of_sequence_is_counted_and_nothing_after_it() -> None:
    mask, truncated = completion_mask(torch.tensor([[7, EOS, 5, 5], [EOS, EOS, 7, 7], [7, 7, 7, 7]]), EOS)
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert truncated.tolist() == [False, False, True]


@given(rows=st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=4))
def test_several_ends_against_a_walk_through_each_row(rows: list[list[int]]) -> None:
    mask, truncated = completion_mask(torch.tensor(rows), [3, 4])
    for row, counted, cut in zip(rows, mask.tolist(), truncated.tolist(), strict=True):
        length = next((i + 1 for i, token in enumerate(row) if token in (3, 4)), 6)
        assert counted == [i < length for i in range(6)]
        assert cut == (not {3, 4} & set(row))


def test_what_a_model_reads() -> None:
    batch = rollouts()
    assert batch.input_ids.equal(torch.cat([batch.prompt_ids, batch.completion_ids], 1))
    assert batch.attention_mask.shape == batch.input_ids.shape
    assert batch.lengths.tolist() == batch.completion_mask.sum(1).tolist()
    assert len(batch) == 4


@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_cutting_and_joining_are_inverse(size: int) -> None:
    batch = rollouts(rows=7)
    parts = batch.split(size)
    assert [len(part) for part in parts] == [len(chunk) for chunk in torch.arange(7).split(size)]
    assert same(RolloutBatch.cat(parts), batch)


def test_joining_pads_prompts_left_and_completions_right() -> None:
    short, long = rollouts(prompt=2, completion=3), rollouts(prompt=4, completion=6, seed=1)
    joined = RolloutBatch.cat([short, long], pad_token_id=9)
    assert joined.prompt_ids[:4, :2].eq(9).all()
    assert not joined.prompt_mask[:4, :2].any()
    assert joined.prompt_ids[:4, 2:].equal(short.prompt_ids)
    assert joined.completion_ids[:4, 3:].eq(9).all()
    assert not joined.completion_mask[:4, 3:].any()
    assert joined.lengths[:4].equal(short.lengths)
    assert same(joined[4:], long)


def test_rows_can_be_chosen_by_a_mask() -> None:
    batch = rollouts()
    kept = batch[~batch.truncated]
    assert len(kept) == int((~batch.truncated).sum())
    assert not kept.truncated.any()


def test_a_batch_moves_and_does_without_log_probs() -> None:
    batch = replace(rollouts(), sampler_logps=None)
    assert "sampler_logps" not in batch.tensors()
    assert batch.to("cpu").sampler_logps is None
    assert same(RolloutBatch.cat(batch.split(3)), batch)
    with pytest.raises(ConfigError, match=r"some batches with and some without"):
        RolloutBatch.cat([batch, rollouts()])


RIGHT_PADDED = torch.tensor([[True, True, False]]).expand(4, 3)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt_ids", torch.zeros(4), r"prompt_ids: got shape \(4,\), expected 2 dimensions"),
        ("prompt_mask", torch.ones(4, 2, dtype=torch.bool), r"prompt_mask: got shape \(4, 2\)"),
        ("prompt_mask", torch.ones(4, 3), r"prompt_mask: got torch\.float32"),
        ("prompt_mask", RIGHT_PADDED, r"expected it on the left"),
        ("prompt_mask", torch.zeros(4, 3, dtype=torch.bool), r"got an empty prompt"),
        ("prompt_mask", torch.tensor([[True, False, True]]).expand(4, 3), r"padding inside"),
        ("completion_ids", torch.zeros(3, 5), r"completion_ids: got shape \(3, 5\)"),
        ("completion_mask", torch.zeros(4, 5, dtype=torch.bool), r"got a row without tokens"),
        ("truncated", torch.zeros(4, 1, dtype=torch.bool), r"truncated: got shape \(4, 1\)"),
        ("group_index", torch.zeros(3), r"group_index: got shape \(3,\)"),
        ("sampler_logps", torch.zeros(4), r"sampler_logps: got shape \(4,\)"),
    ],
)
def test_bad_records_are_named(field: str, value: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(rollouts(), **{field: value})


def test_bad_input_is_named() -> None:
    with pytest.raises(ConfigError, match=r"eos_token_id: got none"):
        completion_mask(torch.zeros(1, 2), [])
    with pytest.raises(ConfigError, match=r"completion_ids: got shape \(2,\)"):
        completion_mask(torch.zeros(2), EOS)
    with pytest.raises(ConfigError, match=r"rows: got 0"):
        rollouts().split(0)
    with pytest.raises(ConfigError, match=r"batches: got none"):
        RolloutBatch.cat([])
