from __future__ import annotations

import pytest
import torch
from effml_eval.scoring.causal_model import CausalModel
from effml_eval.scoring.row_scoring import RowScorer
from effml_eval.scoring.token_boundaries import Row
from effml_shared.errors import ConfigError
from effml_shared.transformer import Transformer, TransformerConfig
from hypothesis import given, settings
from hypothesis import strategies as st

MODEL = Transformer(
    TransformerConfig(n_layers=2, d_model=16, n_heads=2, d_ff=16, vocab_size=9, vocab_rows=12), seed=2
).double()
TOKENS = st.lists(st.integers(0, 8), min_size=1, max_size=5)


def rows_of(context: list[int], continuations: list[list[int]]) -> list[Row]:
    return [Row((*context, *continuation), len(continuation)) for continuation in continuations]


def by_hand(row: Row) -> tuple[float, bool]:
    with torch.no_grad():
        logits = MODEL(torch.tensor([row.inputs])).logits[0, -row.n_scored :]
    targets = torch.tensor(row.continuation)
    nats = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(nats), bool((logits.argmax(-1) == targets).all())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=4)), min_size=1, max_size=4), st.booleans())
def test_any_batch_equals_one_row_at_a_time(batch: list[tuple[list[int], list[list[int]]]], share: bool) -> None:
    rows = [row for context, continuations in batch for row in rows_of(context, continuations)]
    found = RowScorer(CausalModel(MODEL), share_prefix=share)(rows)
    for (nats, greedy), row in zip(found, rows, strict=True):
        assert (pytest.approx(nats, abs=1e-10), greedy) == by_hand(row)


def test_the_likeliest_tokens_are_greedy() -> None:
    tokens = [1, 2, 3]
    for _ in range(3):
        with torch.no_grad():
            tokens.append(int(MODEL(torch.tensor([tokens])).logits[0, -1].argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % 9]
    rows = [Row(tuple(tokens), 3), Row(tuple(other), 3), Row(tuple(tokens[:4]), 1), Row(tuple(other), 1)]
    assert [greedy for _, greedy in RowScorer(CausalModel(MODEL), share_prefix=True)(rows)] == [
        True,
        False,
        True,
        False,
    ]


def test_choices_of_one_token_need_one_reading() -> None:
    scorer = RowScorer(CausalModel(MODEL), share_prefix=True)
    scorer(rows_of([1, 2, 3, 4, 5], [[1], [2], [3], [4]]))
    assert (scorer.work.forwards, scorer.work.tokens, scorer.work.tokens_saved) == (1, 5, 15)


@pytest.mark.parametrize(("share", "expected"), [(True, (2, 30 + 6, 90)), (False, (1, 120 + 6, 0))])
def test_a_context_is_read_once_for_all_its_choices(share: bool, expected: tuple[int, int, int]) -> None:
    scorer = RowScorer(CausalModel(MODEL), share_prefix=share)
    scorer(rows_of([3] * 30, [[1, 2], [2, 1, 4], [3, 1, 1, 1], [4]]))
    assert (scorer.work.forwards, scorer.work.tokens, scorer.work.tokens_saved) == expected


def test_a_context_of_one_token_is_not_worth_a_second_call() -> None:
    scorer = RowScorer(CausalModel(MODEL), share_prefix=True)
    scorer(rows_of([8], [[1, 2, 3, 4, 5], [2, 3, 4, 5, 6]]))  # as the first windows of documents
    assert (scorer.work.forwards, scorer.work.tokens_saved) == (1, 0)


def test_the_head_sees_only_places_that_are_scored() -> None:
    seen: list[int] = []
    assert MODEL.lm_head is not None
    handle = MODEL.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[:-1].numel()))
    RowScorer(CausalModel(MODEL), share_prefix=False)(rows_of([1] * 50, [[1], [2]]) + rows_of([2] * 9, [[1, 2, 3]]))
    handle.remove()
    assert seen == [5]


def test_refuses_tokens_that_the_model_does_not_have() -> None:
    scorer = RowScorer(CausalModel(MODEL), share_prefix=True)
    for row in (Row((1, 9), 1), Row((9, 1), 1), Row((-1, 1), 1)):
        with pytest.raises(ConfigError, match=r"token ids: got .*expected 0 to 8"):
            scorer([row])
