"""Merged shapes, and that merging can be undone."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from effml_optim.matrix.tensor_merging import Layout, merged_shape
from hypothesis import given
from hypothesis import strategies as st

shapes = st.lists(st.integers(1, 12), min_size=0, max_size=5).map(tuple)
bounds = st.integers(1, 200)
rules = st.sampled_from([False, True, "fan_in"])


@pytest.mark.parametrize(
    ("shape", "bound", "rule", "expected"),
    [
        ((128, 64, 3, 3), 10000, True, (8192, 9)),
        ((128, 64, 3, 3), 10000, "fan_in", (128, 576)),
        ((128, 64, 3, 3), 2048, "fan_in", (128, 576)),
        ((128, 64, 3, 3), 512, "fan_in", (128, 64, 9)),
        ((128, 64, 3, 3), 512, False, (128, 64, 3, 3)),
        ((64, 64), 10000, True, (4096,)),
        ((64, 64), 10000, "fan_in", (64, 64)),
        ((50257, 64), 10000, True, (50257, 64)),
        ((1, 1), 10, True, (1,)),
        ((), 10, True, ()),
        ((7,), 3, "fan_in", (7,)),
    ],
)
def test_shapes_worked_out_by_hand(shape: tuple[int, ...], bound: int, rule: bool | str, expected: tuple) -> None:
    assert merged_shape(shape, bound, rule) == expected


@given(shapes, bounds, rules)
def test_merging_keeps_the_elements_and_the_bound(shape: tuple[int, ...], bound: int, rule: bool | str) -> None:
    merged = merged_shape(shape, bound, rule)
    assert math.prod(merged) == math.prod(shape)
    assert len(merged) <= max(len(shape), 1)
    assert all(size <= max(bound, *shape, 1) for size in merged)
    if rule == "fan_in" and shape:
        assert merged[0] == shape[0]


@given(shapes, bounds)
def test_greedy_merging_leaves_nothing_to_merge(shape: tuple[int, ...], bound: int) -> None:
    merged = merged_shape(shape, bound, True)
    if len(shape) > 1 and max(shape) <= bound:
        assert all(a * b > bound for a, b in pairwise(merged))


@given(shapes, bounds, rules, st.booleans())
def test_splitting_undoes_merging(shape: tuple[int, ...], bound: int, rule: bool | str, channels_last: bool) -> None:
    channels_last = channels_last and len(shape) > 2
    logical = (shape[0], shape[-1], *shape[1:-1]) if channels_last else shape
    layout = Layout(merged_shape(logical, bound, rule), channels_last=channels_last)
    tensor = torch.arange(math.prod(shape)).reshape(shape)
    assert torch.equal(layout.split(layout.merge(tensor), tensor.shape), tensor)


@pytest.mark.parametrize("rule", [True, "fan_in"])
def test_memory_format_does_not_matter(rule: bool | str) -> None:
    weight = torch.randn(8, 4, 3, 3)
    layout = Layout(merged_shape(weight.shape, 100, rule))
    strided = weight.to(memory_format=torch.channels_last)
    assert torch.equal(layout.merge(strided), layout.merge(weight))
    assert torch.equal(layout.split(layout.merge(strided), weight.shape), weight)


def test_channels_last_merges_as_if_channels_stood_second() -> None:
    weight = torch.randn(8, 4, 3, 3)
    first = Layout((8, 36)).merge(weight)
    last = Layout((8, 36), channels_last=True).merge(weight.permute(0, 2, 3, 1).contiguous())
    assert torch.equal(first, last)
