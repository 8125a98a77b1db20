from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from effml_arch.tasks import Copying, Recall, Task, TaskStream, WordProblem, accuracy
from effml_arch.tasks.task import IGNORE_INDEX, below
from effml_shared.errors import CheckpointError, ConfigError

TASKS = [WordProblem(), WordProblem(length=3, degree=3), Recall(), Copying(length=10, copied=3)]


@pytest.mark.parametrize("task", TASKS, ids=repr)
def test_samples_depend_on_their_number_and_seed_alone(task: Task) -> None:
    whole, other = task.batch(range(6), seed=1), task.batch(range(6), seed=2)
    for name in ("input_ids", "targets"):
        parts = torch.cat([task.batch(range(0, 2), seed=1)[name], task.batch(range(2, 6), seed=1)[name]])
        assert torch.equal(whole[name], parts)
        assert whole[name].shape == (6, task.length)
        assert whole[name].dtype == torch.int64
    assert not torch.equal(whole["input_ids"], other["input_ids"])
    assert whole["input_ids"].min() >= 0
    assert whole["input_ids"].max() < task.vocab_size
    scored = whole["targets"][whole["targets"] != IGNORE_INDEX]
    assert len(scored)
    assert 0 <= scored.min() <= scored.max() < task.vocab_size
    assert task.batch(range(0))["input_ids"].shape == (0, task.length)


def test_samples_stay_what_they_are() -> None:
    """Stored results are comparable only while these numbers hold."""
    assert WordProblem().batch(range(1))["input_ids"][0].tolist() == [1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1]


def test_a_stream_goes_on_where_it_was() -> None:
    stream, again = TaskStream(TASKS[2], seed=3), TaskStream(TASKS[2], seed=3)
    stream.next(5)
    again.load_state_dict(stream.state_dict())
    assert torch.equal(stream.next(2)["input_ids"], again.next(2)["input_ids"])
    assert stream.position == again.position == 7
    for wrong in (TaskStream(TASKS[0], seed=3), TaskStream(TASKS[2], seed=4)):
        with pytest.raises(CheckpointError, match=r"(task|seed): got .*, expected .* of the checkpoint"):
            wrong.load_state_dict(stream.state_dict())
    with pytest.raises(ConfigError, match=r"batch_size: got 0"):
        stream.next(0)


def test_ranks_share_every_batch() -> None:
    whole = TaskStream(TASKS[0])
    ranks = [TaskStream(TASKS[0], rank=rank, world_size=3) for rank in range(3)]
    for size in (7, 2, 3):
        parts = [stream.next(size)["input_ids"] for stream in ranks]
        assert torch.equal(torch.cat(parts), whole.next(size)["input_ids"])


def test_accuracy_counts_scored_targets_only() -> None:
    logits = torch.eye(3)[None]  # says 0, 1, 2
    assert accuracy(logits, torch.tensor([[0, 0, IGNORE_INDEX]])) == 0.5
    assert math.isnan(accuracy(logits, torch.full((1, 3), IGNORE_INDEX)))


def test_integers_from_bits() -> None:
    assert below(np.array([0, 7, 2**64 - 1], np.uint64), 5).tolist() == [0, 2, 0]
