import math

import pytest
import torch
from effml_shared.errors import CheckpointError
from effml_shared.tree import flatten, read_tree, unflatten, write_tree
from hypothesis import given
from hypothesis import strategies as st

leaves = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text()
trees = st.recursive(
    leaves,
    lambda node: st.lists(node) | st.lists(node).map(tuple) | st.dictionaries(st.text() | st.integers(), node),
    max_leaves=12,
)


def same(a, b):
    if isinstance(a, float):
        return isinstance(b, float) and (a == b or (math.isnan(a) and math.isnan(b)))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(trees)
def test_any_plain_tree_comes_back(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "t"
    write_tree(path, tree)
    assert same(read_tree(path), tree)


def test_tensors_of_every_kind_come_back(tmp_path):
    state = {
        "kinds": [torch.randn(2, 3).to(d) for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)],
        "whole": (torch.arange(4), torch.tensor(True), torch.tensor(3.0), torch.zeros(0, 5), torch.zeros(0)),
        "view": torch.randn(4, 6)[:, ::2].t(),
        "dtype": torch.bfloat16,
        "float8": torch.randn(3).to(torch.float8_e4m3fn).view(torch.uint8),
    }
    write_tree(tmp_path / "t", state)
    assert same(read_tree(tmp_path / "t"), state)


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    weight = torch.randn(50, 20)
    tensors, _ = flatten({"embed": weight, "head": weight, "slice": weight[:3]})
    assert list(tensors) == ["embed", "slice"]
    write_tree(tmp_path / "t", {"embed": weight, "head": weight})
    back = read_tree(tmp_path / "t")
    assert back["embed"] is back["head"]


def test_an_optimizer_state_comes_back(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9))
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    write_tree(tmp_path / "t", optimizer.state_dict())
    assert same(read_tree(tmp_path / "t"), optimizer.state_dict())


@pytest.mark.parametrize("leaf", [object(), {1, 2}, b"bytes", 1j, print])
def test_what_cannot_be_stored_is_named_by_its_path(leaf):
    with pytest.raises(CheckpointError, match=r"state a\.1\.b"):
        flatten({"a": [0, {"b": leaf}]})
    with pytest.raises(CheckpointError, match="keys"):
        flatten({(1, 2): 0})


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage", "foreign", "directory"])
def test_a_damaged_file_is_one_line(tmp_path, damage):
    path = tmp_path / "t"
    write_tree(path, {"x": torch.randn(100)})
    content = path.read_bytes()
    if damage in ("missing", "directory"):
        path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
    elif damage != "missing":
        path.write_bytes({"empty": b"", "truncated": content[:-9], "garbage": bytes(reversed(content))}[damage])
    with pytest.raises(CheckpointError) as caught:
        read_tree(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "skeleton",
    [
        {"tensor": "x"},
        {"dict": [1]},
        {"set": []},
        {"dtype": "load"},
        {"dtype": "nothing"},
        {"list": 3},
        {},
        {"a": 1, "b": 2},
    ],
)
def test_a_hostile_skeleton_is_one_line_and_reaches_nothing(skeleton):
    with pytest.raises(CheckpointError, match="cannot be rebuilt"):
        unflatten(skeleton, {})
