"""A contiguous tensor as (outer, length, inner) with blocks along `length`: what kernels see of `Blocks`."""

from __future__ import annotations

import math
from typing import NamedTuple

from effml_quant.quantizer import Quantizer

__all__ = ["RUN", "Lines"]

RUN = 4096  # elements worked on together where one scale serves the whole tensor


class Lines(NamedTuple):
    """The cut of one shape by one quantiser, whose blocks are runs along one axis, channels, or all of the tensor."""

    outer: int
    length: int
    inner: int
    block: int

    @classmethod
    def of(cls, shape: tuple[int, ...], q: Quantizer) -> Lines:
        count = math.prod(shape)
        if q.block == "tensor":
            return cls(1, count, 1, RUN)
        if not isinstance(q.block, int):
            rows = shape[0] if shape else 1
            return cls(rows, count // rows, 1, count // rows)
        axis = q.axis % len(shape)
        return cls(math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]), q.block)

    @property
    def blocks(self) -> int:
        return self.outer * -(-self.length // self.block) * self.inner
