"""Fine-tuning rows and their loss: counted tokens, padding, micro-batches, foreign outputs, resuming."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from effml_rl.rollout_batch import completion_mask
from effml_rl.solution_tree import SolutionTreeTask
from effml_rl.supervised import SupervisedDataset, supervised_loss
from effml_shared.data import Loader
from effml_shared.errors import CheckpointError, ConfigError, DataError
from effml_shared.schedules import Plan
from effml_shared.steps import GradientStep, language_model_loss
from effml_shared.transformer import Transformer, TransformerConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

PROMPTS, COMPLETIONS = [[3, 4, 5], [6], [7, 8]], [[9, 1], [2, 3, 4, 5, 1], [1]]


def transformer(seed: int = 0) -> Transformer:
    return Transformer(TransformerConfig(vocab_size=11, d_model=16, n_layers=2, n_heads=2), seed=seed).double()


def naive(model: nn.Module, prompt_loss: bool) -> tuple[torch.Tensor, int]:
    """Sum one row and one token at a time."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        row = torch.tensor([prompt + completion])
        logps = model(row).logits.log_softmax(-1)[0]
        for place in range(1 if prompt_loss else len(prompt), row.shape[1]):
            total = total - logps[place - 1, row[0, place]]
            count += 1
    return total, count


class TestLoss:
    @pytest.mark.parametrize("prompt_loss", [False, True])
    @pytest.mark.parametrize("chunk", [1, 3, 2048])
    def test_sum_count_and_gradient_are_those_of_single_rows(self, prompt_loss: bool, chunk: int) -> None:
        model = transformer()
        dataset = SupervisedDataset(PROMPTS, COMPLETIONS, prompt_loss=prompt_loss)
        got, count = supervised_loss(model, dataset.batch(np.arange(3)), chunk=chunk)
        wanted, terms = naive(model, prompt_loss)
        assert int(count) == terms == (11 if prompt_loss else 8)
        parameters = list(model.parameters())
        gradients = [torch.autograd.grad(total, parameters) for total in (got, wanted)]
        for ours, theirs in zip((got, *gradients[0]), (wanted, *gradients[1]), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)

    def test_equals_the_shared_loss_on_the_same_batch(self) -> None:
        model, batch = transformer(), SupervisedDataset(PROMPTS, COMPLETIONS).batch(np.arange(3))
        for ours, theirs in zip(supervised_loss(model, batch), language_model_loss(model, batch), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)

    @pytest.mark.parametrize("micro_batch", [1, 2])
    def test_micro_batches_leave_the_update_alone(self, micro_batch: int) -> None:
        batch, updated = SupervisedDataset(PROMPTS, COMPLETIONS).batch(np.arange(3)), []
        for size in (None, micro_batch):
            model = transformer()
            step = GradientStep(model, torch.optim.SGD(model.parameters(), lr=0.1), supervised_loss, micro_batch=size)
            metrics = step(batch, Plan(3))
            updated.append(model.state_dict())
        assert metrics["tokens"] == 8
        for name in updated[0]:
            torch.testing.assert_close(updated[0][name], updated[1][name], atol=1e-12, rtol=0)

    def test_padding_is_worth_nothing(self) -> None:
        model = transformer()
        losses = [
            supervised_loss(model, SupervisedDataset(PROMPTS, COMPLETIONS, pad_id=pad).batch(np.arange(3)))[0]
            for pad in (0, 10)
        ]
        assert losses[0] == losses[1]

    def test_a_rank_without_rows(self) -> None:
        model = transformer()
        total, count = supervised_loss(model, SupervisedDataset(PROMPTS, COMPLETIONS).batch(np.arange(0)))
        assert (total.item(), count.item()) == (0.0, 0)
        total.backward()

    @pytest.mark.parametrize("output", [SimpleNamespace(), SimpleNamespace(logits=torch.zeros(3, 11)), None])
    def test_no_logits(self, output: Any) -> None:
        class Foreign(nn.Module):
            def forward(self, ids: torch.Tensor) -> Any:
                return output

        with pytest.raises(ConfigError, match=r"model: got an output without logits"):
            supervised_loss(Foreign(), SupervisedDataset(PROMPTS, COMPLETIONS).batch(np.arange(3)))


Rows = list[tuple[list[int], list[int]]]
ragged = st.lists(
    st.tuples(st.lists(st.integers(0, 70_000), min_size=1), st.lists(st.integers(0, 99), min_size=1)),
    min_size=1,
    max_size=6,
)


class TestDataset:
    @settings(deadline=None, max_examples=50)
    @given(rows=ragged, prompt_loss=st.booleans())
    def test_padded_and_ragged_rows_are_the_same(
        self, rows: list[tuple[list[int], list[int]]], prompt_loss: bool
    ) -> None:
        prompts, completions = zip(*rows, strict=True)
        widths = [max(map(len, column)) for column in (prompts, completions)]
        padded = [
            torch.tensor([[*([99] * (widths[0] - len(row))), *row] for row in prompts]),
            torch.tensor([[0] * (widths[0] - len(row)) + [1] * len(row) for row in prompts]).bool(),
            torch.tensor([[*row, *([99] * (widths[1] - len(row)))] for row in completions]),
            torch.tensor([[1] * len(row) + [0] * (widths[1] - len(row)) for row in completions]).bool(),
        ]
        first = SupervisedDataset(prompts, completions, prompt_loss=prompt_loss)
        second = SupervisedDataset.from_padded(*padded, prompt_loss=prompt_loss)
        assert first.fingerprint == second.fingerprint
        batch = second.batch(np.arange(len(rows)))
        for i, (prompt, completion) in enumerate(rows):
            row = prompt + completion
            assert batch["input_ids"][i, : len(row)].tolist() == row
            skipped = 1 if prompt_loss else len(prompt)
            assert batch["labels"][i].tolist()[: len(row)] == [-100] * skipped + row[skipped:]
            assert batch["labels"][i, len(row) :].eq(-100).all()

    def test_solution_tree_problems(self) -> None:
        task = SolutionTreeTask(n_states=6, n_actions=6, n_contexts=6, n_problem=6, len_range=(2, 3), n_irrelevant=0)
        examples = task.sample(5, "sft")
        ids = examples.completions(task.tokenizer)
        mask, truncated = completion_mask(ids, task.tokenizer.eos_id)
        assert not truncated.any()
        dataset = SupervisedDataset.from_padded(*examples.prompts(task.tokenizer), ids, mask, prompt_loss=True)
        batch = dataset.batch(np.arange(5))
        for example, row, labels in zip(examples, batch["input_ids"], batch["labels"], strict=True):
            text = f"{example.prompt} {example.completion}".split()
            assert task.tokenizer.decode(row[: len(text)]).split() == text
            assert int((labels != -100).sum()) == len(text) - 1

    def test_a_resumed_loader_goes_on_with_the_next_row(self) -> None:
        whole, first, second = (Loader(SupervisedDataset(PROMPTS, COMPLETIONS), seed=1) for _ in range(3))
        before = first.next(2)["input_ids"]
        second.load_state_dict(first.state_dict())
        after, expected = second.next(2)["input_ids"], whole.next(4)["input_ids"]
        unpadded = [[[token for token in row if token] for row in part.tolist()] for part in (before, after, expected)]
        assert unpadded[0] + unpadded[1] == unpadded[2]

    def test_other_rows_are_not_resumed(self) -> None:
        state = Loader(SupervisedDataset(PROMPTS, COMPLETIONS)).state_dict()
        with pytest.raises(CheckpointError):
            Loader(SupervisedDataset(PROMPTS, COMPLETIONS, prompt_loss=True)).load_state_dict(state)

    @pytest.mark.parametrize(
        ("prompts", "completions", "error"),
        [
            ([], [], DataError),
            ([[1]], [], ConfigError),
            ([[1], []], [[1], [1]], ConfigError),
            ([[1]], [[]], ConfigError),
            ([[1]], [[-1]], ConfigError),
            ([[1]], [[0.5]], ConfigError),
            (["text"], [[1]], ConfigError),
            ([None], [[1]], ConfigError),
        ],
    )
    def test_impossible_rows(self, prompts: Any, completions: Any, error: type[Exception]) -> None:
        with pytest.raises(error, match=r"got"):
            SupervisedDataset(prompts, completions)

    def test_impossible_masks(self) -> None:
        ids, mask = torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.bool)
        for arguments in ((ids, mask.int(), ids, mask), (ids, mask, ids[:1], mask[:1]), (ids, mask, ids, mask[:, 1:])):
            with pytest.raises(ConfigError, match=r"mask: got"):
                SupervisedDataset.from_padded(*arguments)
        with pytest.raises(ConfigError, match=r"row 0: got an empty"):
            SupervisedDataset.from_padded(ids, mask, ids, ~mask)
