from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from effml_diffusion.puzzles.sample_stream import SampleStream, splitmix
from effml_shared.errors import CheckpointError, ConfigError
from torch import Tensor


class Numbers:
    """A source that returns its numbers."""

    fingerprint = "numbers"
    draws = 3

    def batch(self, numbers: Tensor) -> dict[str, Tensor]:
        return {"input_ids": numbers}


def test_splitmix_gives_the_published_numbers() -> None:
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert splitmix(1234567, range(4)).tolist() == expected
    assert splitmix(1234567, range(2, 4)).tolist() == expected[2:]
    seeds = np.array([7, 1234567], np.uint64)
    assert splitmix(seeds, range(1, 3)).tolist()[1] == expected[1:3]
    assert splitmix(seeds, range(0)).shape == (2, 0)
    assert len(splitmix(2**64 - 1, range(2**70, 2**70 + 3))) == 3


def test_samples_do_not_depend_on_batches_or_ranks() -> None:
    whole = SampleStream(Numbers(), seed=3).next(23)["input_ids"]
    assert whole.shape == (23, 3)
    assert whole.dtype == torch.int64
    assert whole.min() >= 0
    parts = SampleStream(Numbers(), seed=3)
    assert torch.equal(torch.cat([parts.next(size)["input_ids"] for size in (1, 7, 10, 5)]), whole)
    ranks = [SampleStream(Numbers(), seed=3, rank=rank, world_size=4) for rank in range(4)]
    rows = [stream.next(size)["input_ids"] for size in (2, 21) for stream in ranks]
    assert torch.equal(torch.cat(rows), whole)
    assert not torch.equal(SampleStream(Numbers(), seed=4).next(23)["input_ids"], whole)


def test_a_resumed_stream_continues() -> None:
    stream = SampleStream(Numbers())
    stream.next(5)
    state = json.loads(json.dumps(stream.state_dict()))
    expected = stream.next(4)["input_ids"]
    resumed = SampleStream(Numbers())
    resumed.load_state_dict(state)
    assert torch.equal(resumed.next(4)["input_ids"], expected)
    with pytest.raises(CheckpointError, match=r"seed: got 1, expected 0 of the checkpoint"):
        SampleStream(Numbers(), seed=1).load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"source: got 'numbers', expected 'others'"):
        resumed.load_state_dict({**state, "source": "others"})


def test_numbers_are_uniform() -> None:
    numbers = SampleStream(Numbers()).next(20000)["input_ids"].double() / 2**63
    assert abs(numbers.mean().item() - 0.5) < 4 / (12 * 60000) ** 0.5
    for shift in range(0, 63, 9):
        odd = (SampleStream(Numbers()).next(4000)["input_ids"] >> shift & 1).double().mean().item()
        assert abs(odd - 0.5) < 4 * 0.5 / 12000**0.5


def test_bad_requests() -> None:
    with pytest.raises(ConfigError, match=r"batch_size: got 0"):
        SampleStream(Numbers()).next(0)
    with pytest.raises(ConfigError, match=r"rank: got 2, expected one of \[0, 2\)"):
        SampleStream(Numbers(), rank=2, world_size=2)
