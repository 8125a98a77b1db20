"""A tensor as lines of blocks: what kernels count must be what `Blocks` cuts."""

import math

import hypothesis.strategies as st
import pytest
from effml_quant import Quantizer
from effml_quant.blocks import Blocks
from effml_quant.kernels.lines import RUN, Lines
from hypothesis import given


@given(
    shape=st.lists(st.integers(1, 70), min_size=1, max_size=4).map(tuple),
    axis=st.integers(-4, 3),
    block=st.integers(1, 40),
)
def test_runs_along_an_axis_are_the_blocks(shape, axis, block):
    axis = axis % len(shape)
    lines = Lines.of(shape, Quantizer("mxfp4", axis=axis, block_size=block))
    assert lines.outer * lines.length * lines.inner == math.prod(shape)
    assert lines.length == shape[axis]
    assert lines.blocks == math.prod(Blocks.cut(shape, axis, block).scales)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_a_channel_is_one_line_and_the_tensor_is_runs_of_one(shape):
    count = math.prod(shape)
    rows = shape[0] if shape else 1
    channel = Lines.of(shape, Quantizer("int4", granularity="channel"))
    assert channel == (rows, count // rows, 1, count // rows)
    assert Lines.of(shape, Quantizer("int4")) == (1, count, 1, RUN)
