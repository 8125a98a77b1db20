from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_arch.recurrent.decoding import decode
from effml_arch.recurrent.layer import RecurrentTransformerConfig, RecurrentTransformerLayer, recurrent_context
from effml_shared.kv_cache import KVCache
from torch import Tensor, nn

LENGTH = 11


def make(backend: str = "tiled", **options: Any) -> RecurrentTransformerLayer:
    torch.manual_seed(0)
    base = {"n_layers": 1, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24, "qk_norm": "head"}
    return RecurrentTransformerLayer(RecurrentTransformerConfig(**{**base, **options}, backend=backend)).double()


def last_of(layer: RecurrentTransformerLayer, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, KVCache]:
    """Return what a layer makes of the last token, the others being in the cache."""
    cache = KVCache(1)
    with torch.no_grad():
        layer(x[:, :-1], attention_mask=None if mask is None else mask[:, :-1], cache=cache)
        return layer(x[:, -1:], cache=cache), cache


@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("write_mix", [1.0, 0.3])
@pytest.mark.parametrize("padding", [0, 5])
def test_equals_the_definition(position: str, window: int | None, write_mix: float, padding: int) -> None:
    x, mask = torch.randn(2, LENGTH, 16).double(), torch.ones(2, LENGTH)
    mask[0, :padding] = 0
    options = {"position": position, "window": window, "write_mix": write_mix}
    (got, cache), (expected, exact) = (last_of(make(backend, **options), x, mask) for backend in ("tiled", "naive"))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(cache.get(0), exact.get(0), rtol=0, atol=1e-13)
    assert cache.length == LENGTH


def test_a_first_token_without_a_past() -> None:
    layer, x, cache = make(), torch.randn(3, 1, 16).double(), KVCache(1)
    with torch.no_grad():
        got = decode(layer, x, recurrent_context(layer.config, x, cache=cache))
        torch.testing.assert_close(got, layer(x), rtol=0, atol=1e-14)
    assert cache.length == 1


def test_no_stored_key_is_copied() -> None:
    layer, cache, x = make(), KVCache(1, max_len=8), torch.randn(1, 8, 16).double()
    with torch.no_grad():
        layer(x[:, :4], cache=cache)
        at = cache.get(0)[0].data_ptr()
        for t in range(4, 8):
            layer(x[:, t : t + 1], cache=cache)
    assert cache.get(0)[0].data_ptr() == at


def test_modules_are_called_and_so_may_be_replaced() -> None:
    layer, x = make(), torch.randn(1, 5, 16).double()
    expected, cache = last_of(layer, x)
    layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj)  # type: ignore[assignment]
    cache.crop(4)
    with torch.no_grad():
        assert torch.equal(layer(x[:, -1:], cache=cache), expected)
