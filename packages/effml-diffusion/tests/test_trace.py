from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from effml_diffusion.flex import Flex, FlexMDM
from effml_diffusion.masked_diffusion import MaskedDiffusion
from effml_diffusion.samplers import ReMDM
from effml_diffusion.trace import Slot, Trace, TraceEvent
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st

MASK = 9

Law = Mapping[tuple[int, ...], float]


def tokens(frames: Sequence[Sequence[Slot]]) -> list[list[int]]:
    return [[slot.token for slot in row] for row in frames]


@given(
    st.integers(0, 5).flatmap(lambda n: st.lists(st.lists(st.integers(7, MASK), min_size=n, max_size=n), min_size=1))
)
def test_replaying_gives_back_every_snapshot(snapshots: list[list[int]]) -> None:
    ids = torch.tensor(snapshots, dtype=torch.int64).view(len(snapshots), -1)
    trace = Trace.from_snapshots(ids, MASK)
    assert tokens(trace.frames()) == snapshots
    assert trace.steps == len(snapshots) - 1


def test_events_of_snapshots() -> None:
    ids = torch.tensor([[1, 9, 9], [1, 5, 9], [1, 9, 6], [1, 4, 7]])
    assert [tuple(event) for event in Trace.from_snapshots(ids, MASK).events] == [
        (0, "reveal", 1, 5),
        (1, "remask", 1, 9),
        (1, "reveal", 2, 6),
        (2, "reveal", 1, 4),
        (2, "remask", 2, 9),  # a token that became another
        (2, "reveal", 2, 7),
    ]


def test_insertions_move_what_stands_behind_them() -> None:
    """Within a step reveals come first, at positions before its insertions, then insertions at their last positions."""
    events = [
        (0, "insert", 0, 0, MASK),
        (0, "insert", 0, 2, MASK),
        (0, "insert", 1, 0, MASK),
        (1, "reveal", 0, 2, 7),
        (1, "insert", 0, 1, MASK),
        (1, "insert", 0, 4, MASK),
        (2, "reveal", 0, 1, 8),
    ]
    trace = Trace.from_flex(events, MASK, start=[5])
    frames = trace.frames()
    assert tokens(frames) == [[5], [9, 5, 9], [9, 9, 5, 7, 9], [9, 8, 5, 7, 9]]
    assert [slot.born for slot in frames[-1]] == [0, 1, -1, 0, 1]
    assert [slot.changed for slot in frames[-1]] == [-1, 2, -1, 1, -1]
    other = Trace.from_flex(events, MASK, row=1)
    assert tokens(other.frames()) == [[], [9], [9], [9]]  # as many steps as the batch


def test_what_samplers_record_can_be_replayed(
    flex_law: Law,
    exact_flex_posterior: Callable[..., Any],
    reference_law: Law,
    exact_posterior: Callable[..., Any],
) -> None:
    network = exact_flex_posterior(flex_law, 2)
    flex = FlexMDM(network, network.mask_id, network.pad_id, max_length=3)
    texts = Flex(12, trace=True, insert_last=True)(flex, 20, generator=torch.Generator().manual_seed(0))
    assert texts.trace is not None
    for row in range(20):
        last = Trace.from_flex(texts.trace, network.mask_id, row=row).frames()[-1]
        assert [slot.token for slot in last] == texts.ids[row, : texts.lengths[row]].tolist()

    model = exact_posterior(reference_law)
    diffusion = MaskedDiffusion(model, model.mask_id)
    sampler = ReMDM(20, strategy="rescale", eta=0.5, history=True)
    out = sampler(diffusion, torch.full((3, 3), model.mask_id), generator=torch.Generator().manual_seed(0))
    assert out.history is not None
    traces = [Trace.from_snapshots(out.history[:, row], model.mask_id) for row in range(3)]
    assert [tokens(trace.frames())[-1] for trace in traces] == out.ids.tolist()
    assert {event.event for trace in traces for event in trace.events} == {"reveal", "remask"}


def test_an_empty_history() -> None:
    assert tokens(Trace.from_flex([], MASK).frames()) == [[]]
    assert tokens(Trace.from_snapshots(torch.tensor([[3, 4]]), MASK).frames()) == [[3, 4]]


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ((0, "delete", 0, 1), r"event: got 'delete', expected one of 'reveal', 'insert', 'remask'"),
        ((0, "reveal", 2, 1), r"position: got 2 in a row of 2 tokens at step 0"),
        ((0, "insert", 3, 1), r"position: got 3"),
        ((0, "reveal", -1, 1), r"position: got -1"),
        ((2, "reveal", 0, 1), r"step: got 2 after 0, expected ascending steps below 2"),
    ],
)
def test_impossible_events(event: tuple[int, str, int, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Trace((1, 2), (TraceEvent(*event),), steps=2, mask_id=MASK)


def test_snapshots_are_of_one_row() -> None:
    for snapshots in (torch.zeros(3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.long), torch.zeros(2, 3)):
        with pytest.raises(ConfigError, match=r"snapshots: got .*expected integers \(steps \+ 1, seq\) of one row"):
            Trace.from_snapshots(snapshots, MASK)
