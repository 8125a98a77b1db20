"""Which elements share a scale: cut a tensor into blocks without moving more than it must.

A run of k elements along one axis, a tile over the last two axes, one slice of the first axis, or the whole tensor. The
cut is a view with the blocks' own axes named, so a reduction over these gives one number per block; only a length
that k does not divide costs a copy, padded with zeros.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch.nn.functional as F
from effml_shared.errors import ConfigError
from torch import Tensor

__all__ = ["Block", "Blocks"]

Block = int | tuple[int, int] | str
"""Elements along the axis, (rows, columns) of a tile, `"channel"` or `"tensor"`."""


class Blocks(NamedTuple):
    """How one shape is cut.

    Attributes:
        shape: of the tensor.
        padded: its shape, each cut axis raised to a multiple of the block.
        view: the padded shape with every cut axis split in two.
        dims: the axes of `view` inside a block.
        scales: shape of the scales: each cut axis counts blocks, and `broadcast` is where they stand in `view`.
        broadcast: `view` with 1 for `dims`.
    """

    shape: tuple[int, ...]
    padded: tuple[int, ...]
    view: tuple[int, ...]
    dims: tuple[int, ...]
    scales: tuple[int, ...]
    broadcast: tuple[int, ...]

    @classmethod
    def cut(cls, shape: tuple[int, ...], axis: int, block: Block) -> Blocks:
        """Cut a shape.

        Raises:
            ConfigError: the axis does not exist, or the tensor has too few.
        """
        ndim = len(shape)
        if block == "tensor" or (block == "channel" and ndim == 0):
            return cls(shape, shape, (1, math.prod(shape)), (1,), (1,) * ndim, (1, 1))
        if isinstance(block, str):
            rows = (shape[0], math.prod(shape[1:]))
            return cls(shape, shape, rows, (1,), (shape[0],) + (1,) * (ndim - 1), (shape[0], 1))
        cuts = {axis: block} if isinstance(block, int) else {-2: block[0], -1: block[1]}
        if any(not -ndim <= a < ndim for a in cuts):
            wanted = f"axis {axis}" if isinstance(block, int) else f"tiles of {block[0]} x {block[1]}"
            raise ConfigError(f"axis: got a tensor of shape {tuple(shape)}, expected one that has {wanted}")
        sizes = {a % ndim: size for a, size in cuts.items()}
        padded: list[int] = []
        view: list[int] = []
        dims: list[int] = []
        scales: list[int] = []
        broadcast: list[int] = []
        for a, n in enumerate(shape):
            size = sizes.get(a)
            if size is None:
                padded.append(n)
                view.append(n)
                scales.append(n)
                broadcast.append(n)
                continue
            count = -(-n // size)
            padded.append(count * size)
            dims.append(len(view) + 1)
            view += [count, size]
            scales.append(count)
            broadcast += [count, 1]
        return cls(shape, tuple(padded), tuple(view), tuple(dims), tuple(scales), tuple(broadcast))

    @property
    def is_padded(self) -> bool:
        return self.padded != self.shape

    def split(self, x: Tensor) -> Tensor:
        """Show a tensor of `shape` as `view`."""
        if self.is_padded:
            widths = [w for old, new in zip(self.shape[::-1], self.padded[::-1], strict=True) for w in (0, new - old)]
            x = F.pad(x, widths)
        return x.reshape(self.view)

    def join(self, x: Tensor) -> Tensor:
        """Undo `split`, without the padding."""
        x = x.reshape(self.padded)
        if self.is_padded:
            for a, (old, new) in enumerate(zip(self.shape, self.padded, strict=True)):
                x = x if old == new else x.narrow(a, 0, old)
        return x
