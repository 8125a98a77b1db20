from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from effml_arch.cost_ledger import rt_cost
from effml_arch.recurrent import operators, tiled, wavefront
from effml_arch.recurrent.layer import RecurrentTransformerConfig
from effml_arch.recurrent.model import RecurrentTransformer
from effml_arch.recurrent.stacking import StackedBlocks
from effml_shared.generation import generate
from effml_shared.kv_cache import KVCache
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

TINY = RecurrentTransformerConfig(
    n_layers=3, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=50, qk_norm="head", base_block=4
)
VARIANTS = {
    "rope": TINY,
    "alibi": replace(TINY, position="alibi", norm="layer", mlp="gelu", mlp_bias=True, qk_norm="full"),
    "window": replace(TINY, position="none", window=5, n_kv_heads=1, qk_norm="none", residual_scale="depth"),
    "mixed": replace(TINY, write_mix=0.3, norm="layer", n_kv_heads=4),
    "two": replace(TINY, n_layers=2, base_block=32),
    "one_position_each": replace(TINY, n_layers=6, base_block=1),
    "hybrid": replace(TINY, n_layers=6, recurrent_layers=(0, 1, 3, 4, 5), position="alibi"),
}


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest) -> RecurrentTransformerConfig:
    return VARIANTS[request.param]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of every wavefront that is run."""
    layers, run = [], wavefront.wavefront

    def counting(*given: Any) -> list[Tensor]:
        layers.append(len(given[0]))
        return run(*given)

    monkeypatch.setattr(wavefront, "wavefront", counting)
    return layers


def make(config: RecurrentTransformerConfig) -> RecurrentTransformer:
    model, stream = RecurrentTransformer(config).double(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=stream))
    return model


def random_ids(batch: int = 2, seq: int = 13) -> Tensor:
    return torch.randint(50, (batch, seq), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def both(model: RecurrentTransformer, call: Callable[[], Any]) -> tuple[Any, Any]:
    """Return what a call gives with the wavefront and without."""
    model.wavefront = "on"
    got = call()
    model.wavefront = "off"
    return got, call()


def close(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def padding(seq: int = 13, pads: int = 3) -> Tensor:
    return torch.cat([torch.arange(seq)[None] >= pads, torch.ones(1, seq, dtype=torch.bool)])


@pytest.mark.parametrize("seq", [2, 3, 8, 13])
def test_equals_layer_by_layer(config: RecurrentTransformerConfig, seq: int, runs: list[int]) -> None:
    model, ids = make(config), random_ids(seq=seq)
    got, expected = both(model, lambda: model(ids, hidden_states=True))
    close(got.logits[..., :50], expected.logits[..., :50])
    close(got.hidden_states, expected.hidden_states)
    assert runs == ([2, 3] if config.n_layers == 6 and config.recurrent_layers != "all" else [config.n_layers])


def test_padding_and_documents(config: RecurrentTransformerConfig, runs: list[int]) -> None:
    model, ids = make(config), random_ids()
    documents = torch.tensor([[4] * 5 + [9] * 8, [1] * 12 + [0]])
    masks: tuple[dict[str, Tensor], ...] = ({"attention_mask": padding()}, {"doc_ids": documents})
    for options in (*masks, {**masks[0], **masks[1]}):

        def call(options: dict[str, Tensor] = options) -> Tensor:
            return model(ids, **options).logits[..., :50]

        close(*both(model, call))
    assert len(runs) >= 3


@pytest.mark.parametrize("padded", [False, True])
def test_the_cache_takes_in_the_same_and_continues(config: RecurrentTransformerConfig, padded: bool) -> None:
    model, ids = make(config), random_ids(seq=20)

    def call() -> list[Any]:
        cache, states = KVCache(config.n_layers), []
        for part in (slice(0, 6), slice(6, 7), slice(7, 18), slice(18, 20)):
            mask = padding(6) if padded and part.start == 0 else None
            states.append(model(ids[:, part], attention_mask=mask, cache=cache).logits[..., :50])
        return [cache.length, *states, *(cache.get(layer) for layer in range(config.n_layers))]

    got, expected = both(model, call)
    assert got[0] == expected[0] == 20
    close(got[1:], expected[1:])


def test_generation_with_left_padding() -> None:
    model, ids = make(TINY), random_ids()
    got, expected = both(model, lambda: generate(model, ids, padding(), max_new_tokens=5).ids)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("layers", "n", "base"), [(3, 13, 4), (6, 40, 32), (2, 7, 1), (4, 2, 8)])
def test_steps_in_sequence_are_those_of_the_ledger(
    layers: int, n: int, base: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, steps, finish = replace(TINY, n_layers=layers, base_block=base), [], StackedBlocks.finish

    def counting(self: Any, x: Tensor, *rest: Any) -> Tensor:
        steps.append(len(x) // 2)
        return finish(self, x, *rest)

    monkeypatch.setattr(StackedBlocks, "finish", counting)
    model = make(replace(config, wavefront="on"))
    with torch.no_grad():
        model(random_ids(seq=n))
    size = wavefront.block_size(n, layers, base)
    assert len(steps) == n + (layers - 1) * size == rt_cost(config, n, wavefront=size).sequential_steps
    assert max(steps) <= layers
    assert n * layers <= sum(steps) < n * layers + layers * size  # nothing but the filling of the last block on top


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_operations_in_sequence_are_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "serves", lambda *given: False)  # the C path is one operation
    model, ids, operations = make(replace(TINY, n_layers=8, base_block=32)), random_ids(1, 128), Operations()

    def counting(*given: Any, **options: Any) -> tiled.Scan:
        with operations:  # the mode does not see into an operator from outside
            return scan(*given, **options)

    scan = tiled.scan
    for module in (operators, wavefront):
        monkeypatch.setattr(module, "scan", counting)

    def call() -> int:
        operations.count = 0
        model(ids)
        return operations.count

    got, expected = both(model, call)
    assert got < 0.3 * expected, (got, expected)


@given(n=st.integers(2, 10_000), layers=st.integers(2, 50), most=st.integers(1, 64))
def test_blocks_are_of_equal_size(n: int, layers: int, most: int) -> None:
    size = wavefront.block_size(n, layers, most)
    blocks = -(-n // size)
    assert 1 <= size <= min(most, n)
    assert (size - 1) * blocks < n  # no smaller size has as few blocks


def test_what_falls_back(runs: list[int]) -> None:
    ids = random_ids()

    def falls_back(change: Callable[[RecurrentTransformer], Any], **options: Any) -> None:
        model = make(replace(TINY, wavefront="on", n_layers=2, **options)).eval()
        change(model)
        with torch.no_grad():
            model(ids)

    def layer(model: RecurrentTransformer) -> Any:
        return model.model["layers"][1]  # type: ignore[index]

    def biased(model: RecurrentTransformer) -> None:
        layer(model).self_attn.q_proj.bias = nn.Parameter(torch.zeros(16).double())

    def patched(model: RecurrentTransformer) -> None:
        layer(model).mlp.forward = layer(model).mlp.forward

    falls_back(lambda model: layer(model).register_forward_hook(lambda *given: None))
    falls_back(lambda model: layer(model).mlp.up_proj.register_forward_pre_hook(lambda *given: None))
    falls_back(lambda model: setattr(layer(model), "write_mix", 0.5))
    falls_back(lambda model: setattr(layer(model), "backend", "naive"))
    falls_back(lambda model: setattr(layer(model).self_attn, "q_proj", nn.Sequential(layer(model).self_attn.q_proj)))
    falls_back(biased)
    falls_back(patched)
    falls_back(lambda model: model.train(), resid_dropout=0.1)
    falls_back(lambda model: None, recurrent_layers=(1,))
    falls_back(lambda model: setattr(model, "wavefront", "auto"))  # on a CPU
    model = make(replace(TINY, wavefront="on"))
    model(ids)  # with gradients
    with torch.no_grad():
        model(ids[:, :1])
        assert model(ids[:0]).logits.shape == (0, 13, 128)
    assert not runs
    with torch.no_grad():
        model.train()(ids)  # without dropout there is nothing to train
    assert runs == [3]


def test_weights_may_change_between_calls() -> None:
    model, ids = make(TINY), random_ids()
    for _ in range(2):
        got, expected = both(model, lambda: model(ids).logits[..., :50])
        close(got, expected)
        with torch.no_grad():
            model.model["layers"][2].mlp.up_proj.weight.mul_(2)  # type: ignore[index]


@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_types(autocast: bool) -> None:
    model, ids = make(TINY), random_ids()
    _, expected = both(model, lambda: model(ids).logits[..., :50])
    model = model.float() if autocast else model.bfloat16()

    def call() -> tuple[Tensor, KVCache]:
        cache = KVCache(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(ids, cache=cache).logits[..., :50].double(), cache

    (got, cache), (other, others) = both(model, call)
    assert cache.nbytes == others.nbytes
    assert (got - expected).norm() <= 3e-2 * expected.norm()
    assert (got - expected).norm() <= 1.2 * (other - expected).norm()  # layers pass their outputs on unrounded


def test_values_that_are_not_finite_stay_in_their_row_and_their_future() -> None:
    model, embeds = make(replace(TINY, wavefront="on")), torch.randn(2, 11, 16).double()
    embeds[0, 6] = float("nan")
    with torch.no_grad():
        logits = model(inputs_embeds=embeds).logits[..., :50]
    assert logits[1].isfinite().all()
    assert logits[0, :6].isfinite().all()
    assert logits[0, 6:].isnan().any(-1).all()
