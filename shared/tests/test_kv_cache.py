from __future__ import annotations

import pytest
import torch
from effml_shared.errors import ConfigError
from effml_shared.kv_cache import KVCache
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def tokens(start: int, count: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Keys (batch, 3, count, 4) that tell their position and row, and values that are their negatives."""
    key = (
        torch.arange(start, start + count).double()[None, None, :, None]
        + 100.0 * torch.arange(batch)[:, None, None, None]
    )
    key = key.expand(batch, 3, count, 4)
    return key, -key


def filled(count: int, max_len: int | None = None, n_layers: int = 2) -> KVCache:
    cache = KVCache(n_layers, max_len)
    for layer in range(n_layers):
        cache.append(layer, *tokens(0, count))
    return cache


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 20), st.integers(-40, -1)), min_size=1, max_size=12), st.booleans())
def test_any_sequence_of_appends_and_crops_equals_a_list(steps: list[int], static: bool) -> None:
    cache, held = KVCache(2, 300 if static else None), 0
    for step in steps:
        if step < 0:
            held = max(0, held + step)
            cache.crop(held)
            continue
        for layer in range(2):
            key, value = cache.append(layer, *tokens(held, step))
            assert cache.length == (held if layer == 0 else held + step)
        held += step
        expected = tokens(0, held)
        assert torch.equal(key, expected[0])
        assert torch.equal(value, expected[1])


def test_capacity_doubles_or_is_fixed() -> None:
    per_token = 2 * 2 * 2 * 3 * 4 * 8
    cache = filled(16)
    assert cache.nbytes == 16 * per_token
    cache.append(0, *tokens(16, 1))
    cache.append(1, *tokens(16, 1))
    assert cache.nbytes == 32 * per_token
    assert filled(5, max_len=7).nbytes == 7 * per_token


def some(mask: Tensor | None) -> Tensor:
    assert mask is not None
    return mask


def test_a_fork_holds_other_rows_and_leaves_its_origin_alone() -> None:
    cache = KVCache(1, max_len=9)
    cache.mark(torch.tensor([[False, True, True], [True, True, True]]))
    cache.append(0, *tokens(0, 3))
    fork = cache.fork(torch.tensor([1, 1, 0]))
    fork.append(0, *tokens(3, 2, batch=3))
    expected = tokens(0, 3)[0][[1, 1, 0]]
    assert torch.equal(fork.get(0)[0], torch.cat([expected, tokens(3, 2, batch=3)[0]], dim=2))
    valid = torch.tensor([[True] * 5, [True] * 5, [False] + [True] * 4])
    assert torch.equal(some(fork.key_valid(5)), valid)
    fork.reset()
    assert cache.length == 3
    assert torch.equal(cache.get(0)[0], tokens(0, 3)[0])
    assert torch.equal(some(cache.key_valid(3)), valid[[2, 0], :3])
    assert fork.nbytes == 3 * cache.nbytes / 2


def test_rows_are_selected() -> None:
    cache = KVCache(1)
    cache.mark(torch.tensor([[False, True], [True, True]]))
    cache.append(0, *tokens(0, 2))
    cache.select(torch.tensor([0, 0, 1, 1]))
    assert cache.get(0)[0][:, 0, 0, 0].tolist() == [0, 0, 100, 100]
    cache.select(torch.tensor([3, 0]))
    assert cache.get(0)[1][:, 0, 1, 0].tolist() == [-101, -1]
    valid = cache.key_valid(3)
    assert valid is not None
    assert valid.tolist() == [[True, True, True], [False, True, True]]


def test_marks_end_with_what_they_mark() -> None:
    cache = filled(3)
    assert cache.key_valid(3) is None
    cache.mark(torch.tensor([[False, True], [True, True]]))
    for layer in range(2):
        cache.append(layer, *tokens(3, 2))
    valid = cache.key_valid(100)
    assert valid is not None
    assert (~valid).nonzero().tolist() == [[0, 3]]
    cache.crop(3)
    valid = cache.key_valid(5)
    assert valid is not None
    assert valid.all()
    cache.reset()
    assert cache.length == 0
    assert cache.key_valid(1) is None
    assert torch.equal(cache.append(0, *tokens(0, 1))[0], tokens(0, 1)[0])


def test_misuse_is_refused_in_one_line() -> None:
    cache = filled(3, max_len=4)
    with pytest.raises(ConfigError, match="got 5 tokens, expected at most max_len=4"):
        cache.append(0, *tokens(3, 2))
    with pytest.raises(ConfigError, match=r"expected \(batch, kv_heads, head_dim\)=\(2, 3, 4\)"):
        cache.append(0, *tokens(3, 1, batch=3))
    with pytest.raises(ConfigError, match="length: got 4"):
        cache.crop(4)
    with pytest.raises(ConfigError, match="keys that require gradients"):
        cache.append(0, tokens(3, 1)[0].clone().requires_grad_(), tokens(3, 1)[1])
    with pytest.raises(ConfigError, match="layer 1"):
        KVCache(2).get(1)
    with pytest.raises(ConfigError, match="padding on the right"):
        KVCache(1).mark(torch.tensor([[True, False]]))
