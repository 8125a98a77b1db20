"""The reference: a frozen copy, a given model, or the policy without its adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from effml_rl.reference import Reference
from effml_shared.errors import ConfigError
from torch import Tensor, nn


class Adapted(nn.Module):
    """What peft gives: a base, an adapter, and a way to switch it off."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.adapter, self.on = nn.Linear(3, 3), nn.Linear(3, 3), True
        self.peft_config = {"default": None}
        self.base.requires_grad_(False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.on = False
        yield
        self.on = True

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (self.adapter(x) if self.on else 0)


def test_a_copy_is_frozen_and_stays() -> None:
    policy = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).train()
    reference = Reference(policy)
    assert reference.copied
    before = [p.clone() for p in reference.model.parameters()]
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1)
    with reference.active() as model:
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert all(a.equal(b) for a, b in zip(model.parameters(), before, strict=True))
    assert policy.training
    assert all(p.requires_grad for p in policy.parameters())


def test_a_copy_travels_and_a_given_model_does_not() -> None:
    policy = nn.Linear(3, 3)
    first = Reference(policy)
    with torch.no_grad():
        policy.weight += 1
    later = Reference(policy)
    later.load_state_dict(first.state_dict())
    assert all(a.equal(b) for a, b in zip(later.model.parameters(), first.model.parameters(), strict=True))
    given = Reference(policy, nn.Linear(3, 3).train())
    assert given.state_dict() == {}
    assert not given.model.training


def test_adapters_are_switched_off_in_place_of_a_copy() -> None:
    policy = Adapted().train()
    reference = Reference(policy)
    x = torch.randn(2, 3)
    with reference.active() as model:
        assert model is policy
        assert model(x).equal(policy.base(x))
    assert policy(x).equal(policy.base(x) + policy.adapter(x))
    assert policy.adapter.weight.requires_grad
    assert policy.training
    assert reference.state_dict() == {}


def test_the_policy_is_no_reference_of_itself() -> None:
    policy = nn.Linear(3, 3)
    with pytest.raises(ConfigError, match=r"ref_model: got the policy itself"):
        Reference(policy, policy)
