from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_arch.recurrent.layer import RecurrentTransformerConfig
from effml_arch.recurrent.model import RecurrentTransformer
from effml_shared.errors import ConfigError

transformers = pytest.importorskip("transformers")
dynamic_cache = pytest.importorskip("effml_arch.hugging_face.dynamic_cache", exc_type=ImportError)
BorrowedCache = dynamic_cache.BorrowedCache

SHAPE: dict[str, Any] = {"n_layers": 2, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24, "vocab_size": 50}


@pytest.mark.parametrize("recurrent_layers", ["all", (0,)])
@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("splits", [(9, 1, 1, 1), (4, 5, 3)])
@torch.no_grad()
def test_serves_as_our_own_cache(recurrent_layers: Any, position: str, splits: tuple[int, ...]) -> None:
    config = RecurrentTransformerConfig(**SHAPE, position=position, recurrent_layers=recurrent_layers, base_block=4)
    model = RecurrentTransformer(config).double()
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, :3] = False
    own, theirs, start = model.new_cache(), transformers.DynamicCache(), 0
    for end in torch.tensor(splits).cumsum(0).tolist():
        expected = model(ids[:, start:end], attention_mask=mask[:, start:end], cache=own).logits
        borrowed = BorrowedCache(theirs, 2, mask[:, :end])
        assert torch.equal(model(ids[:, start:end], cache=borrowed).logits, expected)
        assert borrowed.length == start  # of before the pass
        start = end
    for layer in range(2):
        for ours, other in zip(own.get(layer), BorrowedCache(theirs, 2).get(layer), strict=True):
            assert torch.equal(ours, other)


def stored(*layers: Any) -> Any:
    cache = transformers.DynamicCache()
    for layer, item in enumerate(layers):
        cache.update(item, item, layer)
    return cache


def offloading() -> Any:
    cache = transformers.DynamicCache()
    cache.offloading = True
    return cache


def windowed() -> Any:
    config = transformers.MistralConfig(num_hidden_layers=1, sliding_window=4)
    return transformers.DynamicCache(config=config)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (lambda: transformers.StaticCache(transformers.LlamaConfig(), max_cache_len=8), r"got a StaticCache, expected"),
        (offloading, r"got a DynamicCache, expected a plain DynamicCache"),
        (windowed, r"got a DynamicCache of DynamicSlidingWindowLayer, expected a plain"),
        (lambda: ((torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)),), r"got a tuple, expected"),
        (lambda: stored(torch.zeros(1, 1, 3, 4)), r"past_key_values: got 1 layers, expected num_hidden_layers=2"),
    ],
)
def test_other_caches_are_refused(cache: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BorrowedCache(cache(), 2)
