from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from effml_arch.recurrent.layer import (
    RecurrentContext,
    RecurrentTransformerConfig,
    RecurrentTransformerLayer,
    recurrent_context,
)
from effml_shared.errors import ConfigError
from effml_shared.kv_cache import KVCache
from effml_shared.layers import Block, Context, TransformerConfig
from effml_shared.testing.modules import ModuleKit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TINY = RecurrentTransformerConfig(
    n_layers=1, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=50, qk_norm="head", base_block=4
)


@pytest.fixture(params=["rope", "alibi", "none"])
def position(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["naive", "tiled"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def make(**options: Any) -> RecurrentTransformerLayer:
    torch.manual_seed(0)
    return RecurrentTransformerLayer(replace(TINY, **options)).double().requires_grad_(False)


def close(got: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


class TestLayerConforms(ModuleKit):
    test_compiled_equals_eager: Any = None  # test_model.py compiles a whole model

    def make(self) -> RecurrentTransformerLayer:
        torch.manual_seed(0)
        return RecurrentTransformerLayer(TINY)

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 9)
        mask[0, :2] = 0
        return {"x": torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)), "attention_mask": mask}


# Decoding.


@pytest.mark.parametrize("split", range(1, 14))
def test_prefill_and_decoding_equal_one_pass(split: int, position: str, backend: str) -> None:
    layer, x = (
        make(position=position, backend=backend, window=5 if split % 2 else None),
        torch.randn(2, 14, 16).double(),
    )
    with torch.no_grad():
        expected, cache = layer(x), KVCache(1)
        parts = [layer(x[:, :split], cache=cache)]
        for t in range(split, 14):
            parts.append(layer(x[:, t : t + 1], cache=cache))
            assert cache.length == t + 1
    close(torch.cat(parts, dim=1), expected)


def test_several_tokens_at_once_on_a_cache(position: str, backend: str) -> None:
    layer, x = make(position=position, backend=backend, window=6), torch.randn(2, 23, 16).double()
    with torch.no_grad():
        expected, cache = layer(x), KVCache(1)
        got = torch.cat([layer(part, cache=cache) for part in x.split([3, 9, 1, 10], dim=1)], dim=1)
    close(got, expected)


def test_the_cache_holds_what_the_outputs_give(backend: str) -> None:
    layer, x, cache = make(backend=backend), torch.randn(2, 9, 16).double(), KVCache(1)
    with torch.no_grad():
        z = layer(x, cache=cache)
        context = recurrent_context(layer.config, x)
        keys, values = layer.self_attn.key_value(layer.input_layernorm(z), context)
    close(cache.get(0)[0], keys, 1e-13)
    close(cache.get(0)[1], values, 1e-13)


def test_gradients_with_a_cache_are_refused(backend: str) -> None:
    layer = make(backend=backend).requires_grad_()
    with pytest.raises(ConfigError, match=r"cache: got a pass with gradients"):
        layer(torch.randn(1, 3, 16).double(), cache=KVCache(1))


# Masks.


def test_left_padding_changes_nothing(position: str, backend: str) -> None:
    layer, x = make(position=position, backend=backend), torch.randn(2, 13, 16).double().requires_grad_()
    mask = torch.ones(2, 13)
    mask[0, :5] = 0
    z = layer(x, attention_mask=mask)
    close(z[:1, 5:], layer(x[:1, 5:]))
    close(z[1:], layer(x[1:]))
    (gradient,) = torch.autograd.grad(z[0, 5:].sum() + z[1].sum(), x)
    assert torch.equal(gradient[0, :5], torch.zeros(5, 16).double())
    assert gradient[0, 5:].abs().min() > 0


def test_left_padding_and_a_cache(position: str, backend: str) -> None:
    layer, x, cache = make(position=position, backend=backend), torch.randn(1, 13, 16).double(), KVCache(1)
    mask = torch.ones(1, 9)
    mask[0, :5] = 0
    with torch.no_grad():
        parts = [layer(x[:, :9], attention_mask=mask, cache=cache), layer(x[:, 9:11], cache=cache)]
        parts.append(layer(x[:, 11:], cache=cache))
        close(torch.cat(parts, dim=1)[:, 5:], layer(x[:, 5:]))


def test_packed_documents_are_separate_runs(position: str, backend: str) -> None:
    layer, x = make(position=position, backend=backend), torch.randn(2, 12, 16).double()
    z = layer(x, doc_ids=torch.tensor([[4] * 5 + [9] * 7] * 2))
    close(z, torch.cat([layer(x[:, :5]), layer(x[:, 5:])], dim=1))


def test_a_window_of_one_token_hides_every_persistent_pair(backend: str) -> None:
    layer, x = make(backend=backend, window=1), torch.randn(2, 7, 16).double()
    close(layer(x), torch.cat([layer(part) for part in x.split(1, dim=1)], dim=1))


def test_positions_may_be_given() -> None:
    layer, x = make(), torch.randn(2, 7, 16).double()
    close(layer(x, position_ids=torch.arange(100, 107)[None]), layer(x))  # rotary attention sees differences only
    assert not torch.allclose(layer(x, position_ids=3 * torch.arange(7)[None]), layer(x))


# Dropout and activation checkpointing.


def trained(layer: RecurrentTransformerLayer, x: Tensor, backend: str) -> tuple[Tensor, ...]:
    """Return output, gradients, and what the generator gives next."""
    layer.backend = backend
    torch.manual_seed(5)
    z, following = layer(x), torch.rand(3)
    return z.detach(), *torch.autograd.grad(z.sin().sum(), [x, *layer.parameters()]), following


@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_dropout_is_the_same_whatever_the_backend(mlp: str, position: str) -> None:
    options = {"mlp_bias": True, "residual_scale": "depth", "n_layers": 3, "write_mix": 0.6}
    layer = make(resid_dropout=0.3, position=position, mlp=mlp, **options).requires_grad_()
    x = torch.randn(2, 13, 16).double().requires_grad_()
    for got, expected in zip(trained(layer, x, "tiled"), trained(layer, x, "naive"), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * max(1.0, expected.norm().item()))


def test_dropout_draws_two_masks_for_training_only(backend: str) -> None:
    layer = make(resid_dropout=0.25, backend=backend, position="none")
    with torch.no_grad():
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.zero_()
        layer.self_attn.o_proj.weight.fill_diagonal_(1.0)
    x = torch.randn(16, 40, 16).double()
    added, expected = layer(x)[:, :1] - x[:, :1], layer.eval()(x)[:, :1] - x[:, :1]  # one position sees itself only
    kept = added != 0
    close(added, torch.where(kept, expected / 0.75, 0.0))
    assert 0.6 < kept.double().mean() < 0.9
    assert torch.equal(layer(x), layer(x))
    drawn = layer.train()._draw_kept(x)
    assert drawn is not None
    attention, mlp = drawn.double().flatten(1)
    assert attention.mean().item() == pytest.approx(0.75, abs=0.02)  # 4.6 standard deviations
    assert (attention * mlp).mean().item() == pytest.approx(0.75**2, abs=0.025)


def test_dropout_of_everything_but_little_leaves_finite_gradients(backend: str) -> None:
    layer, x = make(resid_dropout=0.99).requires_grad_(), torch.randn(2, 9, 16).double().requires_grad_()
    assert all(result.isfinite().all() for result in trained(layer, x, backend))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_exact(reentrant: bool, backend: str) -> None:
    layer = make(resid_dropout=0.3, backend=backend).requires_grad_()
    x, results = torch.randn(2, 9, 16).double().requires_grad_(), []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(5)
        call(x).square().sum().backward()
        leaves = [x, *layer.parameters()]
        results.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.grad = None
    for got, expected in zip(*results, strict=True):
        assert got is not None
        assert torch.equal(got, expected)


# Weights and wrong use.


def test_a_blocks_weights_load_strictly() -> None:
    block = Block(TransformerConfig(n_layers=1, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24, qk_norm="head"))
    make().load_state_dict(block.state_dict())


def test_a_replaced_part_needs_the_naive_backend() -> None:
    layer, x = make(), torch.randn(1, 5, 16).double()
    expected = layer(x)
    layer.mlp.up_proj = nn.Sequential(layer.mlp.up_proj)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"mlp.up_proj: got Sequential"):
        layer(x)
    layer.backend = "naive"
    close(layer(x), expected)


def test_a_precision_scheme_is_told_to_take_the_naive_backend() -> None:
    layer = make()
    assert layer.precision_refusal is not None
    assert layer.precision_refusal.startswith("backend: got 'tiled', ")
    assert layer.precision_refusal.endswith('expected backend="naive"')
    layer.backend = "naive"
    assert layer.precision_refusal is None


@pytest.mark.parametrize(
    ("x", "given", "message"),
    [
        (torch.zeros(1, 0, 16), {}, r"x: got torch.float32 of shape \(1, 0, 16\)"),
        (torch.zeros(3, 16), {}, r"x: got"),
        (torch.zeros(()), {}, r"x: got"),
        (torch.zeros(1, 3, 15), {}, r"d_model=16"),
        (torch.zeros(1, 3, 16, dtype=torch.int64), {}, r"x: got torch.int64"),
        (torch.zeros(1, 3, 16), {"attention_mask": torch.ones(1, 4)}, r"attention_mask: got shape \(1, 4\)"),
        (torch.zeros(2, 3, 16), {"doc_ids": torch.ones(1, 3)}, r"doc_ids: got shape \(1, 3\), expected \(2, 3\)"),
        (torch.zeros(2, 3, 16), {"position_ids": torch.ones(3)}, r"expected \(2, 3\) or \(1, 3\)"),
        (torch.zeros(1, 3, 16), {"context": Context()}, r"context: got Context"),
        (torch.zeros(1, 3, 16), {"cache": KVCache(2)}, r"cache: got one of 2 layers"),
        (torch.zeros(1, 3, 16), {"cache": KVCache(1), "doc_ids": torch.zeros(1, 3)}, r"cache: got doc_ids"),
    ],
)
def test_bad_input_is_named(x: Tensor, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make().float()(x, **given)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_position": "post"},
        {"causal": False},
        {"backend": "fast"},
        {"schedule": "push"},
        {"base_block": 0},
        {"resid_dropout": 1.0},
        {"resid_dropout": float("nan")},
        {"window": 0},
        {"write_mix": 2.0},
        {"recurrent_layers": "none"},
        {"recurrent_layers": (1,)},
    ],
)
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        replace(TINY, **options)


def test_values_that_are_not_finite_stay_in_their_row_and_their_future(backend: str) -> None:
    layer, x = make(backend=backend), torch.randn(2, 9, 16).double()
    x[0, 4] = float("nan")
    z = layer(x)
    assert z[1].isfinite().all()
    assert z[0, :4].isfinite().all()
    assert z[0, 4:].isnan().any(-1).all()


def test_an_input_of_any_strides_and_an_empty_batch(backend: str) -> None:
    layer, x = make(backend=backend), torch.randn(16, 9, 2).double()
    close(layer(x.permute(2, 1, 0)), layer(x.permute(2, 1, 0).contiguous()))
    assert layer(torch.zeros(0, 3, 16).double()).shape == (0, 3, 16)
    assert RecurrentContext().past == 0
