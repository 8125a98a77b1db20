from __future__ import annotations

from typing import Any

import pytest
import torch
from effml_arch.sliding_window import SlidingWindowConfig, SlidingWindowTransformer, restrict_to_window
from effml_arch.window_cache import WindowCache
from effml_shared.errors import ConfigError
from effml_shared.generation import generate
from effml_shared.kv_cache import KVCache
from effml_shared.testing.modules import ModuleKit
from effml_shared.transformer import Transformer, TransformerConfig
from torch import nn

SHAPE: dict[str, Any] = {"n_layers": 2, "d_model": 32, "n_heads": 4, "n_kv_heads": 2, "d_ff": 64, "vocab_size": 50}
IDS = torch.randint(50, (2, 41), generator=torch.Generator().manual_seed(0))


def model(window: int, position: str = "rope") -> SlidingWindowTransformer:
    return SlidingWindowTransformer(SlidingWindowConfig(window=window, position=position, **SHAPE)).double()


def logits(model: nn.Module, ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **arguments).logits[..., :50]


class TestSlidingWindowTransformer(ModuleKit):
    def make(self) -> nn.Module:
        return SlidingWindowTransformer(SlidingWindowConfig(window=3, **{**SHAPE, "n_layers": 1}))

    def inputs(self) -> dict[str, Any]:
        return {"input_ids": IDS[:, :9]}

    def test_compiled_equals_eager(self) -> None:
        """Capture the graph without compiling it, which is quicker; it must be one."""
        module = self.make()
        compiled: Any = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(self.outputs(compiled), self.outputs(module), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
def test_a_window_over_everything_changes_nothing(position: str) -> None:
    full = Transformer(TransformerConfig(position=position, **SHAPE)).double()
    windowed = model(41, position)
    windowed.load_state_dict(full.state_dict())
    assert torch.equal(logits(windowed, IDS), logits(full, IDS))
    assert not torch.allclose(logits(model(40, position), IDS)[:, -1], logits(full, IDS)[:, -1])


@pytest.mark.parametrize("window", [1, 2, 5])
def test_information_travels_a_window_per_layer(window: int) -> None:
    reach, changed = 2 * (window - 1), IDS.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 50
    same = (logits(model(window), IDS) == logits(model(window), changed)).all(-1)[0]
    assert same.tolist() == [not 10 <= t <= 10 + reach for t in range(41)]


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("window", [1, 4, 7])
@pytest.mark.parametrize("splits", [[17, 1, 1, 22], [1] * 41, [5, 30, 6], [41]])
def test_cached_equals_uncached_for_chunks_shorter_and_longer_than_the_window(
    position: str, window: int, splits: list[int]
) -> None:
    own = model(window, position)
    cache, parts = own.new_cache(), IDS.split(splits, dim=1)
    found = torch.cat([logits(own, part, cache=cache) for part in parts], dim=1)
    torch.testing.assert_close(found, logits(own, IDS), rtol=0, atol=1e-12)
    assert cache.length == 41


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_larger_caches_do_as_well_and_smaller_ones_are_refused(position: str) -> None:
    own = model(5, position)
    for cache in (KVCache(2), WindowCache(2, 9)):
        found = [logits(own, part, cache=cache) for part in IDS.split([3, 1, 37], dim=1)]
        torch.testing.assert_close(torch.cat(found, dim=1), logits(own, IDS), rtol=0, atol=1e-12)
    with pytest.raises(ConfigError, match=r"cache: got a window of 4, expected at least 5"):
        logits(own, IDS, cache=WindowCache(2, 4))
    with pytest.raises(ConfigError, match=r"cache: got one of 1 layers"):
        logits(own, IDS, cache=WindowCache(1, 5))


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("pads", [1, 3, 7])
def test_left_padding_changes_nothing(position: str, pads: int) -> None:
    own, expected = model(4, position), logits(model(4, position), IDS)
    padded = torch.cat([torch.zeros(2, pads, dtype=torch.int64), IDS], dim=1)
    mask = torch.arange(41 + pads)[None].expand(2, -1) >= pads
    torch.testing.assert_close(logits(own, padded, attention_mask=mask)[:, pads:], expected, rtol=0, atol=1e-12)
    cache = own.new_cache()
    logits(own, padded[:, :20], attention_mask=mask[:, :20], cache=cache)
    rest = [logits(own, padded[:, t : t + 1], cache=cache) for t in range(20, 41 + pads)]
    torch.testing.assert_close(torch.cat(rest, dim=1), expected[:, 20 - pads :], rtol=0, atol=1e-12)


def test_rejected_drafts_are_rolled_back() -> None:
    own = model(5)
    cache = own.new_cache(rollback=3)
    logits(own, IDS[:, :30], cache=cache)
    for _ in range(4):
        logits(own, IDS[:, :3], cache=cache)
        cache.crop(30)
    torch.testing.assert_close(logits(own, IDS[:, 30:], cache=cache), logits(own, IDS)[:, 30:], rtol=0, atol=1e-12)


def test_generates_what_recomputing_everything_gives_in_bounded_memory() -> None:
    own = model(6)
    ids = generate(own, IDS[:, :9], max_new_tokens=40).ids
    for t in range(9, 49):
        assert torch.equal(ids[:, t], logits(own, ids[:, :t])[:, -1].argmax(-1))
    cache, sizes = own.new_cache(max_len=10**9), set()
    for ids in IDS.repeat(1, 5).split(1, dim=1):
        logits(own, ids, cache=cache)
        sizes.add(cache.nbytes)
    assert sizes == {2 * 2 * 2 * 2 * (5 + 16) * 8 * 8}  # layers, keys and values, rows, heads, slots, channels, bytes


def test_masks_are_cut_to_the_keys_at_hand() -> None:
    assert restrict_to_window(None, 4, 4, 4) is None
    assert restrict_to_window(None, 3, 3, 2)[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    seen = torch.tensor([False, True, True, True]).expand(1, 1, 2, 4)
    assert torch.equal(restrict_to_window(seen, 2, 3, 3), seen[..., 1:])
    bias = restrict_to_window(torch.zeros(1, 2, 1, 5), 1, 3, 2)
    assert bias.tolist() == [[[[-float("inf"), 0, 0]]] * 2]


@pytest.mark.parametrize("fields", [{"window": 0}, {"window": 1.5}, {"causal": False}, {"n_heads": 3}])
def test_wrong_fields_are_named(fields: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        SlidingWindowConfig(**{**SHAPE, **fields})


def test_needs_its_own_config() -> None:
    with pytest.raises(ConfigError, match=r"config: got a TransformerConfig, expected a SlidingWindowConfig"):
        SlidingWindowTransformer(TransformerConfig(**SHAPE))
