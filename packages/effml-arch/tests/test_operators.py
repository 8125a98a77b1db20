from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from effml_arch.recurrent import layer as layer_module
from effml_arch.recurrent import operators
from effml_arch.recurrent.layer import RecurrentTransformerConfig, RecurrentTransformerLayer
from effml_arch.recurrent.operators import Operands
from effml_arch.recurrent.tiled import Scan
from effml_shared.errors import ConfigError
from effml_shared.kv_cache import KVCache
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

# PyTorch's own forward-mode formulas are scripted when they are first asked for.
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script` is deprecated:FutureWarning")
TINY = RecurrentTransformerConfig(
    n_layers=1, d_model=16, n_heads=4, n_kv_heads=2, d_ff=24, vocab_size=50, qk_norm="head", base_block=4
)
VARIANTS = {
    "rope": replace(TINY, resid_dropout=0.2),
    "alibi": replace(TINY, position="alibi", norm="layer", mlp="gelu_tanh", mlp_bias=True, qk_norm="full", window=5),
}


def make(config: RecurrentTransformerConfig = TINY) -> RecurrentTransformerLayer:
    torch.manual_seed(0)
    return RecurrentTransformerLayer(config).double()


def compiled(layer: RecurrentTransformerLayer) -> tuple[Any, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(layer, fullgraph=True, backend=counter), counter


def loss_and_gradients(call: Any, layer: RecurrentTransformerLayer, x: Tensor, **given: Any) -> list[Tensor]:
    torch.manual_seed(3)
    loss = call(x, **given).sin().sum()
    return [loss.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])]


# The check itself looks at the gradients of its own copies.
@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("name", VARIANTS)
def test_operators_keep_what_a_compiler_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def recording(z: Tensor, k: Tensor, v: Tensor, operands: Operands, result: Scan) -> Tensor:
        calls.append((z, k, v, operands, result))
        return operators.solution(z, k, v, operands, result)

    monkeypatch.setattr(layer_module, "solution", recording)
    x = torch.randn(2, 9, 16).double().requires_grad_()
    z = make(VARIANTS[name])(x, attention_mask=torch.ones(2, 9), doc_ids=torch.tensor([[0] * 4 + [1] * 5] * 2))
    (parallel, k, v, operands, result) = calls[0]
    plain = operands._replace(**{key: getattr(operands, key).detach() for key in ("q", "own_k", "own_v")})
    for with_lse in (False, True):
        torch.library.opcheck(operators._scan, (*plain, [], with_lse))
    torch.library.opcheck(operators.cotangents, (z.detach(), *plain, list(result)))
    leaves = [t.detach().requires_grad_() for t in (parallel, k, v)]
    torch.library.opcheck(operators._solution, (*leaves, *plain, list(result)))


@pytest.mark.parametrize("name", VARIANTS)
def test_one_graph_per_layer_equals_eager(name: str) -> None:
    layer = make(VARIANTS[name])
    call, counter = compiled(layer)
    mask = torch.ones(2, 13)
    mask[0, :3] = 0
    given = {"attention_mask": mask, "doc_ids": torch.tensor([[0] * 6 + [1] * 7] * 2)}
    x = torch.randn(2, 13, 16).double().requires_grad_()
    results = (loss_and_gradients(each, layer, x, **given) for each in (call, layer))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert counter.frame_count == 1


def test_two_graphs_serve_every_length() -> None:
    layer = make()
    call, counter = compiled(layer)
    for n in (5, 9, 21, 40):  # the second is compiled for any
        x = torch.randn(2, n, 16).double().requires_grad_()
        results = (loss_and_gradients(each, layer, x) for each in (call, layer))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert counter.frame_count == 2


@torch.no_grad()
def test_a_cache_is_compiled_too() -> None:
    layer, x, cache = make().eval(), torch.randn(2, 14, 16).double(), KVCache(1)
    call, counter = compiled(layer)
    parts = [call(part, cache=cache) for part in x.split([5, 3, *[1] * 6], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), layer(x), rtol=0, atol=1e-12)
    assert counter.frame_count <= 3  # the first without a past; one for any number of tokens, and one for one


@pytest.mark.slow
def test_inductor_equals_eager() -> None:
    torch._dynamo.reset()
    layer, x = make().float(), torch.randn(2, 13, 16).requires_grad_()
    call = torch.compile(layer, fullgraph=True)
    results = (loss_and_gradients(each, layer, x) for each in (call, layer))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_second_derivatives_are_refused() -> None:
    layer, x = make(), torch.randn(1, 4, 16).double().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(ConfigError, match=r"backward: got a second derivative .*, or backend='naive'"):
        gradient.sum().backward()


def test_transforms_are_refused() -> None:
    layer, x = make(), torch.randn(2, 4, 16).double()
    weights = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    message = r"backend: got 'tiled' under torch.func or forward-mode autograd, expected 'naive'"
    with pytest.raises(ConfigError, match=message):
        torch.func.grad(loss)(weights, x)
    with pytest.raises(ConfigError, match=message):
        torch.func.vmap(loss, (None, 0))(weights, x[:, None])
    with forward_ad.dual_level(), pytest.raises(ConfigError, match=message):
        layer(forward_ad.make_dual(x, x))
    layer.backend = "naive"
    got = torch.func.grad(loss)(weights, x)
    layer.backend = "tiled"
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    for name, gradient in zip(leaves, torch.autograd.grad(loss(leaves, x), list(leaves.values())), strict=True):
        torch.testing.assert_close(gradient, got[name], rtol=1e-11, atol=1e-12)
