from __future__ import annotations

import numpy as np
import pytest
from effml_arch.tasks.recall import Recall
from effml_arch.tasks.task import IGNORE_INDEX
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st

tasks = st.builds(
    lambda slots, key_tokens, value_tokens, key_len, value_len, share, noise: Recall(
        length=slots * (key_len + value_len),
        key_tokens=key_tokens,
        value_tokens=value_tokens,
        n_keys=max(1, round(share * key_tokens**key_len)),
        key_len=key_len,
        value_len=value_len,
        noise=noise,
        noise_tokens=3 if noise else 0,
    ),
    *(st.integers(1, most) for most in (20, 5, 5, 3, 3)),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.2, 0.7]),
)


@settings(deadline=None)
@given(task=tasks, seed=st.integers(0, 2**32))
def test_targets_are_what_a_dictionary_knows(task: Recall, seed: int) -> None:
    batch = task.batch(range(4), seed)
    for ids, targets in zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True):
        known: dict[tuple[int, ...], list[int]] = {}
        expected: list[int] = []
        for start in range(0, task.length, task.key_len + task.value_len):
            slot = ids[start : start + task.key_len + task.value_len]
            asked = [IGNORE_INDEX] * len(slot)
            if slot[0] < task.key_tokens + task.value_tokens:
                key, value = tuple(slot[: task.key_len]), slot[task.key_len :]
                assert all(0 <= token < task.key_tokens for token in key)
                assert all(task.key_tokens <= token < task.key_tokens + task.value_tokens for token in value)
                if key in known:
                    assert known[key] == value
                    asked[task.key_len - 1 : -1] = value
                known[key] = value
            else:
                assert task.noise > 0
                assert all(task.key_tokens + task.value_tokens <= token < task.vocab_size for token in slot)
            expected += asked
        assert targets == expected
        assert len(known) <= task.n_keys


def test_share_of_scored_pairs() -> None:
    """The i-th pair repeats a key with probability 1 - (7/8)^i."""
    targets = Recall().batch(range(4000))["targets"].numpy()[:, ::2]
    expected = 1 - (7 / 8) ** np.arange(16)
    assert np.abs((targets != IGNORE_INDEX).mean(0) - expected).max() < 4 * 0.5 / 4000**0.5
    assert (Recall().batch(range(100))["targets"][:, 1::2] == IGNORE_INDEX).all()


def test_keys_and_values_are_uniform_and_differ_between_sequences() -> None:
    ids = Recall().batch(range(4000))["input_ids"].numpy()
    for column, first in ((ids[:, 0], 0), (ids[:, 1], 8)):
        counts = np.bincount(column - first, minlength=8)
        assert np.abs(counts - 500).max() < 4 * (4000 * 7 / 64) ** 0.5
    agree = np.mean(ids[:-1, 1] == ids[1:, 1])
    assert agree == pytest.approx(1 / 8, abs=0.025)


def test_share_of_noise() -> None:
    ids = Recall(noise=0.3, noise_tokens=4).batch(range(1000))["input_ids"].numpy()
    assert np.mean(ids[:, ::2] >= 16) == pytest.approx(0.3, abs=0.015)
    assert np.array_equal(ids[:, ::2] >= 16, ids[:, 1::2] >= 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 31}, r"length: got 31, expected a multiple of 2"),
        ({"length": 0}, r"length: got 0"),
        ({"n_keys": 9}, r"n_keys: got 9 of 8\^1 possible keys"),
        ({"key_len": 9, "length": 100}, r"n_keys: .* those <= 2\^16"),
        ({"noise": 0.5}, r"noise_tokens: got 0 with noise=0.5"),
        ({"noise_tokens": 2}, r"noise_tokens: got 2 with noise=0.0"),
        ({"noise": 1.0, "noise_tokens": 2}, r"noise: got 1.0"),
        ({"noise": float("nan"), "noise_tokens": 2}, r"noise: got nan"),
        ({"value_tokens": 0}, r"value_tokens: got 0"),
    ],
)
def test_wrong_fields_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recall(**fields)
