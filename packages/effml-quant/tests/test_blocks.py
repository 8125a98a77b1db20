from __future__ import annotations

import pytest
import torch
from effml_quant.blocks import Blocks
from effml_shared.errors import ConfigError
from hypothesis import given
from hypothesis import strategies as st


def block_of(index: tuple[int, ...], axis: int, block) -> tuple[int, ...]:
    """Say which block an element is in, the slow way."""
    ndim = len(index)
    if block == "tensor":
        return (0,) * ndim
    if block == "channel":
        return index[:1] + (0,) * (ndim - 1)
    sizes = {axis % ndim: block} if isinstance(block, int) else {ndim - 2: block[0], ndim - 1: block[1]}
    return tuple(i // sizes.get(a, 1) for a, i in enumerate(index))


@st.composite
def cuts(draw):
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)))
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    blocks = [st.integers(1, 9), st.sampled_from(["tensor", "channel"])]
    if len(shape) > 1:
        blocks.append(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    return shape, axis, draw(st.one_of(blocks))


@given(cuts())
def test_every_element_is_in_the_block_it_belongs_to(cut):
    shape, axis, block = cut
    blocks = Blocks.cut(shape, axis, block)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    view = blocks.split(x)
    assert view.shape == blocks.view
    assert torch.equal(blocks.join(view), x)
    label = torch.arange(torch.Size(blocks.broadcast).numel()).reshape(blocks.broadcast).expand(blocks.view)
    label = blocks.join(label.contiguous())
    where = {}
    for index in torch.cartesian_prod(*[torch.arange(n) for n in shape]).reshape(-1, len(shape)).tolist():
        where.setdefault(int(label[tuple(index)]), set()).add(block_of(tuple(index), axis, block))
    assert all(len(found) == 1 for found in where.values())
    assert len(set().union(*where.values())) == len(where) == torch.Size(blocks.scales).numel()


def test_shapes():
    assert Blocks.cut((5, 33), -1, 32).scales == (5, 2)
    assert Blocks.cut((5, 33), 0, 2).scales == (3, 33)
    assert Blocks.cut((2, 33, 40), -1, (16, 16)).scales == (2, 3, 3)
    assert Blocks.cut((8, 3, 5), -1, "channel").scales == (8, 1, 1)
    assert Blocks.cut((8, 3, 5), -1, "tensor").scales == (1, 1, 1)
    assert Blocks.cut((), -1, "tensor").scales == Blocks.cut((), -1, "channel").scales == ()
    assert Blocks.cut((0, 5), -1, 4).scales == (0, 2)


def test_a_divisible_cut_is_a_view():
    x = torch.randn(4, 64, 6)
    blocks = Blocks.cut((4, 64, 6), 1, 32)
    assert not blocks.is_padded
    assert blocks.split(x).data_ptr() == x.data_ptr()


def test_the_padding_is_zero():
    blocks = Blocks.cut((3, 5), -1, 4)
    assert blocks.split(torch.ones(3, 5))[:, 1].tolist() == [[1, 0, 0, 0]] * 3


@pytest.mark.parametrize(
    ("shape", "axis", "block", "wanted"),
    [
        ((3, 4), 2, 2, "axis 2"),
        ((3, 4), -3, 2, "axis -3"),
        ((), -1, 2, "axis -1"),
        ((3,), -1, (2, 4), "tiles of 2 x 4"),
    ],
)
def test_missing_axes(shape, axis, block, wanted):
    with pytest.raises(ConfigError, match=rf"axis: got a tensor of shape .*, expected one that has {wanted}"):
        Blocks.cut(shape, axis, block)
