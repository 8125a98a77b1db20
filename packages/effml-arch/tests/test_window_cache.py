from __future__ import annotations

import pytest
import torch
from effml_arch.window_cache import WindowCache
from effml_shared.errors import ConfigError
from effml_shared.kv_cache import KVCache
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def tokens(start: int, count: int, *, batch: int = 2) -> Tensor:
    """Return keys (batch, 1, count, 2) that say which token of which row they are."""
    position = torch.arange(start, start + count, dtype=torch.float64)
    rows = 1000.0 * torch.arange(batch, dtype=torch.float64)
    return (position + rows[:, None])[:, None, :, None].expand(batch, 1, count, 2)


@settings(deadline=None)
@given(
    window=st.integers(1, 12),
    rollback=st.integers(0, 6),
    moves=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 6)), max_size=25),
)
def test_holds_what_a_full_cache_would_show_through_the_window(
    window: int, rollback: int, moves: list[tuple[int, int]]
) -> None:
    cache, full = WindowCache(2, window, rollback=rollback), KVCache(2)
    for new, back in [(1, 0), *moves]:
        start = full.length
        for layer in range(2):
            keys = tokens(start, new) + 0.5 * layer
            expected = full.append(layer, keys, -keys)
            given = cache.append(layer, keys, -keys)
            seen = min(start, window - 1) + new
            for got, whole in zip(given, expected, strict=True):
                assert torch.equal(got, whole[:, :, start + new - seen :])
        assert cache.length == start + new
        back = min(back, rollback, new)
        if back:
            cache.crop(start + new - back)
            full.crop(start + new - back)
        kept = min(full.length, window - 1)
        for layer in range(2):
            for got, whole in zip(cache.get(layer), full.get(layer), strict=True):
                assert torch.equal(got, whole[:, :, full.length - kept :])
        capacity = window - 1 + rollback + max(window - 1 + rollback, 16)
        assert cache.nbytes == 2 * 2 * 2 * capacity * 2 * 8


def test_crop_refuses_what_is_forgotten() -> None:
    cache = WindowCache(1, 4, rollback=2)
    with pytest.raises(ConfigError, match=r"expected an append to it first"):
        cache.get(0)
    cache.append(0, tokens(0, 10), tokens(0, 10))
    cache.crop(3)  # nothing is dropped yet
    assert cache.get(0)[0][0, 0, :, 0].tolist() == [0, 1, 2]
    cache.append(0, tokens(3, 97), tokens(3, 97))
    with pytest.raises(ConfigError, match=r"length: got 97, expected 98 to the 100 tokens seen, rollback=2"):
        cache.crop(97)
    with pytest.raises(ConfigError, match=r"length: got 101"):
        cache.crop(101)
    cache.crop(98)
    assert cache.get(0)[0][0, 0, :, 0].tolist() == [95, 96, 97]
    with pytest.raises(ConfigError, match=r"length: got 0"):
        cache.crop(0)
    cache.reset()
    assert cache.length == 0
    cache.crop(0)
    assert cache.append(0, tokens(7, 1), tokens(7, 1))[0].shape[2] == 1


def test_rows_are_selected() -> None:
    cache = WindowCache(1, 3)
    cache.append(0, tokens(0, 50), tokens(0, 50))
    cache.select(torch.tensor([0, 0, 1, 1]))
    assert cache.get(0)[0][:, 0, :, 0].tolist() == [[48, 49], [48, 49], [1048, 1049], [1048, 1049]]
    cache.select(torch.tensor([3]))
    assert cache.append(0, tokens(50, 1, batch=1), tokens(50, 1, batch=1))[0][:, 0, :, 0].tolist() == [[1048, 1049, 50]]


def test_a_failed_append_leaves_the_cache_as_it_was() -> None:
    cache = WindowCache(1, 5)
    cache.append(0, tokens(0, 30), tokens(0, 30))
    before = cache.get(0)[0].clone()
    for keys, message in (
        (tokens(30, 1).clone().requires_grad_(), r"require gradients"),
        (tokens(30, 40).clone().requires_grad_(), r"require gradients"),
        (tokens(30, 1, batch=3), r"got keys of \(3, 1, 2\)"),
        (tokens(30, 90, batch=3), r"got keys of \(3, 1, 2\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            cache.append(0, keys, keys)
        assert cache.length == 30
        assert torch.equal(cache.get(0)[0], before)


def test_length_waits_for_the_last_layer() -> None:
    cache = WindowCache(2, 3)
    cache.append(0, tokens(0, 40), tokens(0, 40))
    assert cache.length == 0
    cache.append(1, tokens(0, 40), tokens(0, 40))
    assert cache.length == 40


@pytest.mark.parametrize("arguments", [{"window": 0}, {"window": 2.0}, {"window": 4, "rollback": -1}])
def test_wrong_sizes(arguments: dict) -> None:
    with pytest.raises(ConfigError, match=r"window|rollback"):
        WindowCache(1, **arguments)
