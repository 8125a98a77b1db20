from __future__ import annotations

import numpy as np
import pytest
from effml_arch.tasks.copying import Copying
from effml_arch.tasks.task import IGNORE_INDEX
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None)
@given(prompt=st.integers(1, 40), share=st.floats(0, 1), symbols=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_the_answer_is_the_prompt_without_blanks(prompt: int, share: float, symbols: int, seed: int) -> None:
    copied = max(1, round(share * prompt))
    task = Copying(length=prompt + copied, copied=copied, symbols=symbols)
    batch = task.batch(range(3), seed)
    for ids, targets in zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True):
        assert ids[prompt:] == [symbols + 1] * copied
        assert targets[:prompt] == [IGNORE_INDEX] * prompt
        assert targets[prompt:] == [token for token in ids[:prompt] if token != symbols]
        assert max(targets) < symbols


def test_places_and_symbols_are_uniform() -> None:
    batch = Copying(length=20, copied=4, symbols=5).batch(range(4000))
    placed = (batch["input_ids"][:, :16] != 5).numpy()
    assert np.abs(placed.mean(0) - 4 / 16).max() < 4 * (3 / 16 / 4000) ** 0.5
    counts = np.bincount(batch["targets"][:, -4:].flatten())
    assert np.abs(counts - 3200).max() < 4 * (16000 * 4 / 25) ** 0.5


def test_without_blanks_it_is_plain_copying() -> None:
    batch = Copying(length=8, copied=4, symbols=3).batch(range(5))
    assert (batch["input_ids"][:, :4] == batch["targets"][:, 4:]).all()


@pytest.mark.parametrize("fields", [{"length": 0}, {"copied": 0}, {"copied": 33}, {"symbols": 0}, {"length": None}])
def test_wrong_fields_are_named(fields: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Copying(**fields)
