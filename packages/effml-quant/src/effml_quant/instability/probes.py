"""What all meters are: something measured every n steps on batches of its own, inside the `Loop` or out of it.

A meter never looks at the training step itself: it runs the model again, at the weights of the moment, and leaves
gradients, buffers and random state as it found them. So it works with accumulation, clipping and compiled steps, and
costs its extra passes divided by n.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from effml_shared import seeding
from effml_shared.checks import check_count
from effml_shared.errors import ConfigError
from effml_shared.loop import Hook, Loop
from torch import nn

__all__ = ["Probe", "undisturbed"]


class Probe(Hook):
    """Base of the meters; a subclass says in `measure(batches)` what it measures.

    In the `Loop`, place it before the trial's own hooks: its readings are then recorded with the step's metrics. In any
    other loop, `log(probe(batch))` once per step is all: it returns nothing (an empty dict) when it is not due.

    Args:
        every: steps between measurements. In the `Loop` there is one at every multiple.
        batches: to measure on, always the same. None: the batch that the next step will see (in the `Loop`, so its
            data must be able to go back by one), or the one given to the call.
    """

    def __init__(self, every: int = 100, batches: Sequence[Any] | None = None) -> None:
        check_count("every", every, 1)
        if batches is not None and not len(batches):
            raise ConfigError("batches: got none, expected at least one, or None")
        self.every, self.batches = every, batches
        self.calls = 0

    def measure(self, *batches: Any) -> Mapping[str, float]:
        """Return readings by name."""
        raise NotImplementedError

    def __call__(self, batch: Any = None) -> dict[str, float]:
        """Return the readings if this is the first call or `every` calls have passed since the last ones; else nothing.

        Raises:
            ConfigError: there is no batch, neither here nor from the start.
        """
        due = self.calls % self.every == 0
        self.calls += 1
        if not due:
            return {}
        batches = self.batches if self.batches is not None else [batch]
        if batches[0] is None:
            raise ConfigError("batch: got None, expected one, or batches= when the probe is made")
        return dict(self.measure(*batches))

    def on_step(self, loop: Loop, metrics: Mapping[str, float]) -> None:
        """Add the readings to the step's metrics when due."""
        if loop.clock.step % self.every == 0:
            batches = self.batches if self.batches is not None else [_upcoming(loop)]
            cast(dict[str, float], metrics).update(self.measure(*batches))  # a Step returns a dict


def _upcoming(loop: Loop) -> Any:
    """Return the batch that the next step will draw, and leave the data where it is."""
    position = loop.data.state_dict()
    batch = loop.data.next(loop.schedule(loop.clock).batch_size)
    loop.data.load_state_dict(position)
    return batch


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Keep gradients, buffers and the global random state of a model's surroundings as they are."""
    random, gradients = seeding.capture(), [(p, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    model.zero_grad(set_to_none=True)  # a backward pass would add to what is there, in place
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        seeding.restore(random)
