"""The contract around the update: groups, closures, checkpoints of other versions, hooks, pickling."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from effml_optim import SOAP, Shampoo
from effml_optim.matrix.optimizer import state_dtype
from effml_shared.checks import check_choice, check_count, check_range
from effml_shared.errors import ConfigError
from torch import Tensor
from torch.nn import Parameter


def trained(steps: int = 3) -> tuple[Parameter, SOAP]:
    param = Parameter(torch.zeros(3, 2))
    optimizer = SOAP([param])
    train(param, optimizer, steps)
    return param, optimizer


def train(param: Parameter, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()


def test_a_bad_group_is_not_added() -> None:
    _, optimizer = trained()
    with pytest.raises(ConfigError, match="betas: got 3 numbers, expected 2"):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], "betas": (0.9, 0.9, 0.9)})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("kind", [SOAP, Shampoo])
def test_gradients_of_all_groups_are_checked_before_any_update(kind: Any) -> None:
    good, bad = Parameter(torch.zeros(3, 2)), Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    optimizer = kind([("good", good), ("bad", bad)])
    good.grad, bad.grad = torch.ones_like(good), torch.ones_like(bad)
    with pytest.raises(ConfigError, match=r"^bad: got a torch\.complex64 gradient"):
        optimizer.step()
    assert not optimizer.state[good]


def test_closures_run_with_gradients_and_their_loss_comes_back() -> None:
    param, optimizer = trained()
    with torch.no_grad():
        loss = optimizer.step(lambda: (param * 2).sum())
    assert isinstance(loss, Tensor)
    assert loss.requires_grad


def test_loading_obeys_the_hooks_of_the_user() -> None:
    param, optimizer = trained()
    other = SOAP([copy.deepcopy(param)])

    def zero(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        entries = {key: {**entry, "exp_avg": torch.zeros(3, 2)} for key, entry in state["state"].items()}
        return {**state, "state": entries}

    other.register_load_state_dict_pre_hook(zero)
    other.load_state_dict(optimizer.state_dict())
    (entry,) = other.state.values()
    assert not entry["exp_avg"].any()
    assert torch.equal(entry["basis_0"], optimizer.state[param]["basis_0"])


def test_options_missing_from_an_old_checkpoint_take_their_defaults() -> None:
    param, optimizer = trained()
    state = copy.deepcopy(optimizer.state_dict())
    del state["param_groups"][0]["stagger"]
    other = SOAP([copy.deepcopy(param)])
    other.load_state_dict(state)
    assert other.param_groups[0]["stagger"] is False


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_go_their_own_way(clone: Any) -> None:
    param, optimizer = trained()
    other_param, other = clone((param, optimizer))
    train(other_param, other, 12)
    assert optimizer.state[param]["step"] == 2
    train(param, optimizer, 12)
    assert torch.equal(param, other_param)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_and_loaded_states_have_the_same_options(clone: Any) -> None:
    param, optimizer = trained()
    groups = optimizer.state_dict()["param_groups"]
    _, other = clone((param, optimizer))
    assert other.state_dict()["param_groups"] == groups
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict()["param_groups"] == groups
    other.add_param_group({"params": [Parameter(torch.zeros(2, 2))]})
    assert other.param_groups[1].keys() == optimizer.param_groups[0].keys()
    assert other.defaults == optimizer.defaults


def test_options_may_change_between_steps() -> None:
    param, optimizer = trained()
    optimizer.param_groups[0]["precondition_frequency"] = 1
    before = optimizer.state[param]["basis_0"].clone()
    train(param, optimizer, 1)
    assert not torch.equal(before, optimizer.state[param]["basis_0"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_ranges_reject_what_is_no_number_in_them(value: float) -> None:
    with pytest.raises(ConfigError, match=r"^lr: got"):
        check_range("lr", value, 0.0)


def test_counts_and_choices() -> None:
    check_count("f", 1, 1)
    for value in (0, 1.0, True, "1"):
        with pytest.raises(ConfigError, match=r"^f: got"):
            check_count("f", value, 1)
    check_choice("merge", True, (False, True, "x"))
    check_choice("merge", "".join(["x"]), (False, True, "x"))
    with pytest.raises(ConfigError, match="merge: got 1, expected one of False, True, 'x'"):
        check_choice("merge", 1, (False, True, "x"))


@pytest.mark.parametrize(
    ("param", "least", "expected"),
    [
        (torch.bfloat16, "float32", torch.float32),
        (torch.float16, "float32", torch.float32),
        (torch.float64, "float32", torch.float64),
        (torch.float32, "float64", torch.float64),
    ],
)
def test_state_is_never_narrower_than_the_parameter(param: torch.dtype, least: str, expected: torch.dtype) -> None:
    assert state_dtype({"precond_dtype": least}, torch.zeros(1, dtype=param)) == expected
