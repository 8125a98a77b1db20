"""How a parameter is laid out for a matrix optimizer: which axes are merged, and which of the result carry a factor.

Merging is a `reshape`: it costs nothing for a contiguous tensor and one copy otherwise, and keeps no state. What it
changes is the size of the factors: a convolution (128, 64, 3, 3) seen as (128, 576) has one 128 x 128 and one 576 x 576
factor, unmerged it has four and its two spatial ones say next to nothing.

Source: the greedy rule is that of the public code of SOAP (arXiv 2409.11321); `"fan_in"` is ours, because the greedy
rule merges outputs with inputs and turns every small matrix into a vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Layout", "merged_shape"]


def merged_shape(shape: Sequence[int], bound: int, rule: bool | str) -> tuple[int, ...]:
    """Merge neighbouring axes of `shape` while their product stays within `bound`.

    Args:
        shape: the logical shape, output axis first.
        bound: the largest merged axis; an axis that is larger by itself is left alone.
        rule: `False` keeps the shape; `True` merges greedily from the left, outputs with inputs; `"fan_in"` keeps the
            output axis and merges the others from the right.

    >>> merged_shape((128, 64, 3, 3), 10000, True)
    (8192, 9)
    >>> merged_shape((128, 64, 3, 3), 10000, "fan_in"), merged_shape((128, 64, 3, 3), 512, "fan_in")
    ((128, 576), (128, 64, 9))
    """
    if rule is False or len(shape) < 2:
        return tuple(shape)
    if rule is True:
        return tuple(_greedy(shape, bound))
    return (shape[0], *reversed(_greedy(reversed(shape[1:]), bound)))


def _greedy(sizes: Iterable[int], bound: int) -> list[int]:
    merged: list[int] = []
    current = 1
    for size in sizes:
        if current * size <= bound:
            current *= size
        elif current > 1:
            merged.append(current)
            current = size
        else:
            merged.append(size)
    if current > 1 or not merged:
        merged.append(current)
    return merged


@dataclass(frozen=True)
class Layout:
    """How one parameter is seen: its merged `shape`, the `axes` of it that carry a factor, and where channels stand.

    `channels_last` says that the *logical* shape is (out, *spatial, in), as in JAX or TensorFlow weights: the last axis
    is moved behind the first before merging. It has nothing to do with torch memory formats.

    >>> import torch
    >>> layout = Layout((128, 9, 64), channels_last=True)
    >>> weight = torch.randn(128, 3, 3, 64)
    >>> torch.equal(layout.split(layout.merge(weight), weight.shape), weight)
    True
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    channels_last: bool = False

    def merge(self, tensor: Tensor) -> Tensor:
        """Return `tensor` in the merged shape: a view where strides allow it."""
        return (tensor.movedim(-1, 1) if self.channels_last else tensor).reshape(self.shape)

    def split(self, merged: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo `merge`: return a view of `merged` in the parameter's own `shape`."""
        if not self.channels_last:
            return merged.reshape(shape)
        return merged.reshape(shape[0], shape[-1], *shape[1:-1]).movedim(1, -1)
