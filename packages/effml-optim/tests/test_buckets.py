"""Stacked state: found without copying, shared by nobody else, and right when its rows are scattered."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from effml_optim import SOAP, Muon
from effml_optim.matrix.buckets import Bucket, checked_gradient
from effml_shared.errors import ConfigError
from torch.nn import Parameter


def buckets_of(optimizer: Any) -> list[Bucket]:
    return [bucket for _, bucket in optimizer.buckets()]


def trained(count: int = 4, steps: int = 3) -> tuple[list[Parameter], SOAP]:
    params = [Parameter(torch.zeros(3, 2)) for _ in range(count)]
    optimizer = SOAP(params)
    train(params, optimizer, steps)
    return params, optimizer


def train(params: list[Parameter], optimizer: SOAP, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def test_rows_of_a_bucket_lie_in_one_stack() -> None:
    params, optimizer = trained()
    (bucket,) = buckets_of(optimizer)
    stack = bucket.stack("exp_avg")
    assert stack.shape == (4, 3, 2)
    for row, param in zip(stack, params, strict=True):
        assert row.data_ptr() == optimizer.state[param]["exp_avg"].data_ptr()


def test_loading_stacks_again_and_shares_nothing() -> None:
    params, optimizer = trained()
    copies = copy.deepcopy(params)
    other = SOAP(copies)
    other.load_state_dict(optimizer.state_dict())
    (ours,), (theirs,) = buckets_of(optimizer), buckets_of(other)
    for key in ("exp_avg", "basis_0"):
        assert torch.equal(ours.stack(key), theirs.stack(key))
        assert ours.stack(key).data_ptr() != theirs.stack(key).data_ptr()
    entry = other.state[copies[0]]
    assert theirs.stack("exp_avg").data_ptr() == entry["exp_avg"].data_ptr()
    train(copies, other, 1)
    assert (entry["step"], optimizer.state[params[0]]["step"]) == (3, 2)


def test_scattered_rows_are_copied_back() -> None:
    params, optimizer = trained()
    twins, twin = trained()
    for param in twins:  # as if someone had moved the state away and back
        twin.state[param] = {key: value.clone() for key, value in twin.state[param].items()}
    train(params, optimizer, 12)
    train(twins, twin, 12)
    for param, other in zip(params, twins, strict=True):
        assert torch.equal(param, other)
        for key, value in optimizer.state[param].items():
            assert torch.equal(value, twin.state[other][key])


def test_parameters_part_when_their_step_counts_do() -> None:
    params, optimizer = trained()
    for param in params[1:3]:
        param.grad = None
    optimizer.step()
    assert sorted(len(bucket.members) for bucket in buckets_of(optimizer)) == [2, 2]


def test_devices_and_dtypes_do_not_mix() -> None:
    params = [Parameter(torch.zeros(3, 2, dtype=dtype)) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    optimizer = Muon(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert [bucket.dtype for bucket in buckets_of(optimizer)] == [torch.float32, torch.float64]


def test_sparse_gradients_are_refused() -> None:
    param = Parameter(torch.zeros(2, 2))
    param.grad = torch.eye(2).to_sparse()
    with pytest.raises(ConfigError, match="w: got a sparse gradient"):
        checked_gradient(param, "w")


def test_complex_gradients_are_refused() -> None:
    param = Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    param.grad = torch.zeros_like(param)
    with pytest.raises(ConfigError, match=r"w: got a torch\.complex64 gradient"):
        checked_gradient(param, "w")
