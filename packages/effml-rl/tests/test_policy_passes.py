"""Passes over rollouts: padding, trimming, micro-batches and order change nothing; dropout is off."""

from __future__ import annotations

import pytest
import torch
from effml_rl.policy_passes import map_tokens, policy_logps, select, trimmed, without_dropout
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn

F64 = torch.float64


def transformer() -> Transformer:
    return Transformer(TransformerConfig(n_layers=2, d_model=16, n_heads=2, d_ff=24, vocab_size=11), seed=3).to(F64)


def rows(extra_left: int = 0, extra_right: int = 0, fill: int = 5) -> dict[str, Tensor]:
    """Four rows of prompts with 1 to 4 tokens and completions with 5, 2, 3 and 0 counted ones."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 11, (4, 9), generator=generator)
    prompt = torch.arange(4) >= torch.tensor([0, 3, 1, 2])[:, None]
    counted = torch.arange(5) < torch.tensor([5, 2, 3, 0])[:, None]
    pad = nn.functional.pad
    return {
        "prompt_ids": pad(ids[:, :4].where(prompt, torch.tensor(fill)), (extra_left, 0), value=fill),
        "prompt_mask": pad(prompt, (extra_left, 0)),
        "completion_ids": pad(ids[:, 4:].where(counted, torch.tensor(fill)), (0, extra_right), value=fill),
        "loss_mask": pad(counted, (0, extra_right)),
        "advantages": torch.tensor([[1.0], [-1.0], [0.5], [2.0]], dtype=F64),
    }


@pytest.mark.parametrize(("left", "right", "fill"), [(3, 0, 5), (0, 4, 5), (2, 7, 9)])
def test_padding_changes_nothing(left: int, right: int, fill: int) -> None:
    model, plain = transformer(), rows()
    expected = policy_logps(model, plain, temperature=0.7).logps[plain["loss_mask"]]
    padded = rows(left, right, fill)
    cut = trimmed(padded)
    assert cut["prompt_ids"].shape == (4, 4)
    assert cut["completion_ids"].shape == (4, 5)
    assert cut["advantages"].shape == (4, 1)
    for given in (padded, cut):
        got = policy_logps(model, given, temperature=0.7).logps[given["loss_mask"]]
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


def test_trimming_a_part_keeps_what_its_rows_need() -> None:
    cut = trimmed(select(rows(), torch.tensor([1, 3])))
    assert cut["prompt_ids"].shape == (2, 2)
    assert cut["completion_ids"].shape == (2, 2)
    nothing = trimmed(select(rows(), torch.tensor([3])))
    assert nothing["completion_ids"].shape == (1, 1)


def test_a_tool_in_the_middle_is_seen_and_not_counted() -> None:
    model, given = transformer(), rows()
    with_tool = {**given, "loss_mask": given["loss_mask"].clone()}
    with_tool["loss_mask"][0, 2] = False
    got = policy_logps(model, with_tool, temperature=1.0).logps[0]
    torch.testing.assert_close(got, policy_logps(model, given, temperature=1.0).logps[0])


@pytest.mark.parametrize("micro_batch", [None, 1, 3, 8])
def test_micro_batches_are_put_back_in_their_places(micro_batch: int | None) -> None:
    model, given = transformer(), rows(1, 2)
    whole = policy_logps(model, given, temperature=1.0).logps
    got = map_tokens(lambda part: policy_logps(model, part, temperature=1.0).logps, given, micro_batch)
    torch.testing.assert_close(got[given["loss_mask"]], whole[given["loss_mask"]], atol=1e-12, rtol=0)
    assert not got.requires_grad


def test_no_rows_need_no_pass() -> None:
    empty = select(rows(), torch.zeros(0, dtype=torch.int64))
    assert map_tokens(lambda part: pytest.fail("called"), empty, 2).shape == (0, 5)


def test_dropout_is_off_in_training_mode() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.attention_dropout, self.dropout_name = nn.Dropout(0.5), 0.3, "kept"

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.drop(x), self.attention_dropout, self.training)

    layer = Layer().train()
    without_dropout(layer)
    assert layer(torch.ones(100)).eq(1).all()
    assert (layer.training, layer.dropout_name) == (True, "kept")
