"""CUDA graphs of a layer's sequential passes: one launch in the place of some forty per position.

A pass is a function of tensors whose work depends on their shapes alone. When it is called for the second time with the
same shapes, its work is recorded; from then on a call copies its tensors to where the recording reads them, replays it
and copies the results out. Weights are copied like everything else, so layers of equal shape share one recording and
parameters may move. State: per recording the memory of one call. Cost of a call: its inputs and results once more.
Sources: the Recurrent Transformer, arXiv 2604.21215, whose authors' code captures its loops; the cache is our own.
Untested on a device: no GPU was at hand; the rules when to record were tested on a CPU.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["GraphCache", "Recording", "record"]


class Recording(NamedTuple):
    """Recorded work: fill the inputs, replay, read the outputs."""

    inputs: list[Tensor]
    replay: Callable[[], None]
    outputs: tuple[Tensor, ...]


def record(function: Callable[[list[Tensor]], tuple[Tensor, ...]], tensors: Sequence[Tensor]) -> Recording:
    """Record what a function launches for these tensors, of one CUDA device, without changing or keeping them."""
    device = tensors[0].device
    with torch.cuda.device(device):
        inputs = [tensor.detach().clone() for tensor in tensors]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # whatever is compiled or allocated at first use must be there before
            function(inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = function(inputs)

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return Recording(inputs, replay, outputs)


def recordable(tensors: Sequence[Tensor]) -> bool:
    """Return whether the work on these tensors can be recorded: plain ones on one GPU, while nothing else records."""
    device = tensors[0].device
    if device.type != "cuda" or any(type(tensor) is not Tensor or tensor.device != device for tensor in tensors):
        return False
    return not torch.cuda.is_current_stream_capturing()


class GraphCache:
    """The recordings of the calls that were repeated last, at most `limit` of them."""

    def __init__(self, limit: int = 8) -> None:
        self.limit = limit
        self._recordings: OrderedDict[Hashable, Recording | None] = OrderedDict()  # None: called once
        self._lock = threading.Lock()

    def __call__(self, function: Callable[..., tuple[Tensor, ...]], *arguments: Any) -> tuple[Tensor, ...]:
        """Return function(*arguments): by a recording if there is one, which the first repetition of a call makes.

        Arguments are tensors, numbers, strings, None, and lists of them. The function draws no random numbers (masks
        of dropout are arguments), does not wait for the device, and returns new tensors.
        """
        leaves, structure = tree_flatten(arguments)
        at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        tensors = [leaves[i] for i in at]
        if not tensors or not recordable(tensors):
            return function(*arguments)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        fixed = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        place = (tensors[0].device, torch.cuda.current_stream(tensors[0].device))  # replays on one stream are in order
        key = (function, str(structure), fixed, shapes, place)

        def call(inputs: list[Tensor]) -> tuple[Tensor, ...]:
            filled = list(leaves)
            for i, tensor in zip(at, inputs, strict=True):
                filled[i] = tensor
            return function(*tree_unflatten(filled, structure))

        with self._lock:
            return self._run(key, call, tensors)

    def _run(
        self, key: Hashable, call: Callable[[list[Tensor]], tuple[Tensor, ...]], tensors: list[Tensor]
    ) -> tuple[Tensor, ...]:
        if key not in self._recordings:
            self._recordings[key] = None
            while len(self._recordings) > self.limit:
                self._recordings.popitem(last=False)
            return call(tensors)
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        if recording is None:
            recording = self._recordings[key] = record(call, tensors)
        for static, tensor in zip(recording.inputs, tensors, strict=True):
            static.copy_(tensor)
        recording.replay()
        return tuple(output.clone() for output in recording.outputs)

    def clear(self) -> None:
        """Free the memory of all recordings."""
        with self._lock:
            self._recordings.clear()
