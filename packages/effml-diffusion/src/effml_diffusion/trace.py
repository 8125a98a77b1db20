"""What happened in one generation, step by step: tokens revealed, inserted or masked again, and the rows in between.

A trace is the row at the start and a list of events; all else follows by replaying them. Snapshots of a row of fixed
length, and the events that `samplers.Flex` records, become the same kind of trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from effml_shared.checks import check_choice
from effml_shared.errors import ConfigError
from torch import Tensor

__all__ = ["Slot", "Trace", "TraceEvent"]

KINDS = ("reveal", "insert", "remask")


class TraceEvent(NamedTuple):
    """One thing that happened in one step, from 0; its position is that in the row when it happens."""

    step: int
    event: str  # reveal | insert | remask
    position: int
    token: int


class Slot(NamedTuple):
    """One place of a row."""

    token: int
    born: int  # the step that inserted it, -1 if it was there at the start
    changed: int  # the step that revealed it or masked it again last, -1 if none


@dataclass(frozen=True)
class Trace:
    """The history of one row.

    >>> trace = Trace((5, 9), (TraceEvent(0, "reveal", 1, 6), TraceEvent(1, "insert", 1, 9)), steps=2, mask_id=9)
    >>> [[slot.token for slot in row] for row in trace.frames()]
    [[5, 9], [5, 6], [5, 9, 6]]
    """

    start: tuple[int, ...]
    events: tuple[TraceEvent, ...]  # in the order in which they happen
    steps: int
    mask_id: int

    def __post_init__(self) -> None:
        length, last = len(self.start), 0
        for event in self.events:
            check_choice("event", event.event, KINDS)
            if not last <= event.step < self.steps:
                raise ConfigError(f"step: got {event.step} after {last}, expected ascending steps below {self.steps}")
            inserts = event.event == "insert"
            if not 0 <= event.position < length + inserts:
                raise ConfigError(f"position: got {event.position} in a row of {length} tokens at step {event.step}")
            length, last = length + inserts, event.step

    @classmethod
    def from_snapshots(cls, snapshots: Tensor, mask_id: int) -> Trace:
        """Make a trace from ids (steps + 1, seq) of one row, the first before any step.

        A token that changes into another was masked and revealed within one step.
        """
        if snapshots.ndim != 2 or not len(snapshots) or snapshots.is_floating_point():
            got = f"{snapshots.dtype} {tuple(snapshots.shape)}"
            raise ConfigError(f"snapshots: got {got}, expected integers (steps + 1, seq) of one row")
        events = []
        for step, position in (snapshots[1:] != snapshots[:-1]).nonzero().tolist():
            old, new = snapshots[step : step + 2, position].tolist()
            if old != mask_id:
                events.append(TraceEvent(step, "remask", position, mask_id))
            if new != mask_id:
                events.append(TraceEvent(step, "reveal", position, new))
        return cls(tuple(snapshots[0].tolist()), tuple(events), len(snapshots) - 1, mask_id)

    @classmethod
    def from_flex(
        cls, events: Iterable[tuple[int, str, int, int, int]], mask_id: int, *, row: int = 0, start: Sequence[int] = ()
    ) -> Trace:
        """Make a trace from what `Flex(trace=True)` recorded, (step, event, row, position, token) each.

        row: which text of the batch; start: its given tokens, without pads.
        """
        every = list(events)
        mine = [TraceEvent(step, event, position, token) for step, event, r, position, token in every if r == row]
        steps = 1 + max((event[0] for event in every), default=-1)
        return cls(tuple(map(int, start)), tuple(mine), steps, mask_id)

    def frames(self) -> list[list[Slot]]:
        """Return the row before the first step and after each, `steps + 1` of them."""
        row = [Slot(token, -1, -1) for token in self.start]
        frames, pending = [row.copy()], list(self.events[::-1])
        for step in range(self.steps):
            while pending and pending[-1].step == step:
                event = pending.pop()
                if event.event == "insert":
                    row.insert(event.position, Slot(event.token, step, -1))
                else:
                    row[event.position] = Slot(event.token, row[event.position].born, step)
            frames.append(row.copy())
        return frames
