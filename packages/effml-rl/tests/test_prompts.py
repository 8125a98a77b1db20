"""Prompts: records of many shapes, shuffled epochs, shares of ranks, a position that can be stored."""

from __future__ import annotations

from typing import Any

import pytest
from effml_rl.prompts import Prompt, PromptData
from effml_shared.errors import CheckpointError, ConfigError, DataError

RECORDS = [(f"question {i}", i) for i in range(7)]


def targets(prompts: list[Prompt]) -> list[Any]:
    return [prompt.target for prompt in prompts]


def test_records() -> None:
    assert Prompt.of("why?") == Prompt("why?", None)
    assert Prompt.of(("why?", 3)) == Prompt("why?", 3)
    assert Prompt.of(Prompt([1, 2], 3)).prompt == [1, 2]
    assert Prompt.of({"prompt": "why?"}).target is None
    for wrong in (3, [1, 2], {"question": "why?"}, (1, 2, 3)):
        with pytest.raises(ConfigError, match=r"record: got .*, expected a text"):
            Prompt.of(wrong)


def test_a_text_is_no_list_of_prompts() -> None:
    for wrong in ("why?", None, 3):
        with pytest.raises(ConfigError, match=r"prompts: got .*, expected a list of records"):
            PromptData(wrong)  # type: ignore[arg-type]


def test_every_epoch_has_every_prompt_in_another_order() -> None:
    data = PromptData(RECORDS, seed=1)
    epochs = [targets(data.next(7)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_ranks_share_what_one_would_get() -> None:
    whole, shares = PromptData(RECORDS), [PromptData(RECORDS, rank=rank, world_size=3) for rank in range(3)]
    for size in (4, 2, 5):
        assert targets(whole.next(size)) == [target for share in shares for target in targets(share.next(size))]


def test_a_stored_position_goes_on() -> None:
    data = PromptData(RECORDS, seed=2)
    data.next(5)
    state = data.state_dict()
    expected = [targets(data.next(3)) for _ in range(4)]
    other = PromptData(RECORDS, seed=2)
    other.load_state_dict(state)
    assert [targets(other.next(3)) for _ in range(4)] == expected


def test_other_prompts_and_no_prompts_are_refused() -> None:
    state = PromptData(RECORDS).state_dict()
    for other in (PromptData(RECORDS[:6]), PromptData([(f"{text}?", t) for text, t in RECORDS])):
        with pytest.raises(CheckpointError, match=r"resume with the same data"):
            other.load_state_dict(state)
    with pytest.raises(DataError, match=r"records: got none"):
        PromptData([])
