from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from effml_arch.recurrent.layer import RecurrentTransformerConfig
from effml_arch.recurrent.model import RecurrentTransformer
from effml_arch.window_cache import WindowCache
from effml_shared.errors import ConfigError
from effml_shared.generation import generate
from effml_shared.kv_cache import KVCache
from effml_shared.testing.modules import ModuleKit
from effml_shared.transformer import Transformer, TransformerConfig
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

SHAPE: dict[str, Any] = {"n_layers": 3, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_ff": 24, "vocab_size": 50}
TINY = RecurrentTransformerConfig(**SHAPE, qk_norm="head", base_block=4)
VARIANTS = {
    "rope": TINY,
    "alibi": replace(TINY, position="alibi", norm="layer", mlp="gelu", qk_norm="full"),
    "hybrid": replace(TINY, position="alibi", recurrent_layers=(0, 2), tied=True),
    "hybrid_rope": replace(TINY, recurrent_layers=(1,)),
}


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest) -> RecurrentTransformerConfig:
    return VARIANTS[request.param]


def random_ids(batch: int = 2, seq: int = 12) -> Tensor:
    return torch.randint(50, (batch, seq), generator=torch.Generator().manual_seed(0))


def logits(model: Transformer, *args: Any, **given: Any) -> Tensor:
    out = model(*args, **given).logits
    assert out is not None
    return out[..., :50]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


class TestModelConforms(ModuleKit):
    test_compiled_equals_eager: Any = pytest.mark.slow(ModuleKit.test_compiled_equals_eager)

    def make(self) -> RecurrentTransformer:
        return RecurrentTransformer(TINY)

    def inputs(self) -> dict[str, Any]:
        return {"input_ids": random_ids(), "labels": random_ids()}


def test_the_whole_model_is_one_graph() -> None:
    torch._dynamo.reset()
    model = RecurrentTransformer(replace(VARIANTS["hybrid_rope"], n_layers=2, resid_dropout=0.2)).double()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, model):
        torch.manual_seed(0)
        loss = call(random_ids(), labels=random_ids()).loss_sum
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def test_starts_from_the_transformers_weights(config: RecurrentTransformerConfig) -> None:
    fields = set(TransformerConfig.__dataclass_fields__)
    plain = Transformer(TransformerConfig(**{k: v for k, v in vars(config).items() if k in fields}), seed=3)
    weights = RecurrentTransformer(config, seed=3).state_dict()
    assert list(weights) == list(plain.state_dict())
    assert all(torch.equal(weights[name], value) for name, value in plain.state_dict().items())
    assert not torch.allclose(logits(plain, random_ids()), logits(RecurrentTransformer(config, seed=3), random_ids()))


def test_no_recurrent_layer_is_the_transformer() -> None:
    plain = Transformer(TransformerConfig(**SHAPE, qk_norm="head"))
    assert torch.equal(
        logits(RecurrentTransformer(replace(TINY, recurrent_layers=())), random_ids()), logits(plain, random_ids())
    )


def test_backends_agree(config: RecurrentTransformerConfig) -> None:
    mask = torch.ones(2, 12)
    mask[0, :3] = 0
    results = []
    for backend in ("naive", "tiled"):
        model = RecurrentTransformer(replace(config, backend=backend)).double()
        loss = model(random_ids(), attention_mask=mask, labels=random_ids()).loss_sum
        assert loss is not None
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11 * max(1.0, expected.norm().item()))


@torch.no_grad()
@pytest.mark.parametrize("split", [1, 5, 11])
def test_cached_equals_uncached(config: RecurrentTransformerConfig, split: int) -> None:
    model, ids, cache = RecurrentTransformer(config).double(), random_ids(), KVCache(3)
    parts = [logits(model, part, cache=cache) for part in ids.split([split, 12 - split], dim=1)]
    close(torch.cat(parts, dim=1), logits(model, ids))


@torch.no_grad()
def test_cached_equals_uncached_with_left_padding(config: RecurrentTransformerConfig) -> None:
    model, ids, mask, cache = RecurrentTransformer(config).double(), random_ids(), torch.ones(2, 12), KVCache(3)
    mask[0, :3] = 0
    parts = [logits(model, ids[:, :5], attention_mask=mask[:, :5], cache=cache)]
    parts += [logits(model, ids[:, t : t + 1], cache=cache) for t in range(5, 12)]
    close(torch.cat(parts, dim=1)[mask.bool()], logits(model, ids, attention_mask=mask)[mask.bool()])


@torch.no_grad()
def test_cropping_forgets(config: RecurrentTransformerConfig) -> None:
    model, ids, cache = RecurrentTransformer(config).double(), random_ids(), KVCache(3)
    model(ids, cache=cache)
    cache.crop(7)
    close(logits(model, ids[:, 7:], cache=cache), logits(model, ids)[:, 7:])


@torch.no_grad()
def test_generation_equals_full_recomputation_and_ignores_padding(config: RecurrentTransformerConfig) -> None:
    model, ids, mask = RecurrentTransformer(config).double(), random_ids(seq=6), torch.ones(2, 6)
    mask[0, :2] = 0
    out = generate(model, ids, mask, max_new_tokens=6).ids
    for row, start in ((0, 2), (1, 0)):
        alone = ids[row : row + 1, start:]
        for _ in range(6):
            alone = torch.cat([alone, logits(model, alone)[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(out[row, start:], alone[0])


def test_generation_does_not_drop_out() -> None:
    options = replace(VARIANTS["hybrid"], resid_dropout=0.5)
    model, plain = RecurrentTransformer(options).double(), RecurrentTransformer(VARIANTS["hybrid"]).double()
    assert model.training
    got, expected = (generate(each, random_ids(), max_new_tokens=5).ids for each in (model, plain))
    assert torch.equal(got, expected)
    assert not torch.equal(logits(model, random_ids()), logits(plain, random_ids()))


def test_a_cache_of_another_depth_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cache: got one of 2 layers"):
        RecurrentTransformer(TINY)(random_ids(), cache=KVCache(2))


def test_learns_prefix_parity_in_one_layer_and_a_standard_layer_does_not() -> None:
    config = RecurrentTransformerConfig(
        n_layers=1, d_model=32, n_heads=4, d_ff=64, vocab_size=2, position="alibi", qk_norm="head", mlp="gelu"
    )
    accuracies, stream = {}, torch.Generator().manual_seed(0)
    for mix in (1.0, 0.0):
        model = RecurrentTransformer(replace(config, write_mix=mix))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0)
        for _ in range(200):
            bits = torch.randint(2, (64, 8), generator=stream)
            parity = bits.cumsum(1) % 2
            out = model(bits).logits[..., :2].transpose(1, 2)
            loss = nn.functional.cross_entropy(out, parity)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        accuracies[mix] = float((out.argmax(1) == parity).float().mean())
    assert accuracies[1.0] > 0.9 > 0.8 > accuracies[0.0], accuracies


def test_ddp_and_fsdp2_have_the_same_gradients() -> None:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("DDP and FSDP2 on the CPU need torch.distributed with gloo: not in this build")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, ids = RecurrentTransformer(replace(TINY, backend="naive")).double(), random_ids()
    loss = whole(ids, labels=ids).loss_sum
    assert loss is not None
    loss.backward()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(RecurrentTransformer(TINY).double())
        parallel(ids, labels=ids).loss_sum.backward()
        with torch.device("meta"):
            sharded: Any = RecurrentTransformer(TINY).double()
        mesh = init_device_mesh("cpu", (1,))
        for layer in sharded.model["layers"]:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        sharded.to_empty(device="cpu").reset_parameters()
        sharded(ids, labels=ids).loss_sum.backward()
        for name, parameter in whole.named_parameters():
            assert parameter.grad is not None
            for got in (parallel.module.get_parameter(name).grad, sharded.get_parameter(name).grad.full_tensor()):
                assert (got - parameter.grad).norm() <= 1e-11 * parameter.grad.norm(), name
    finally:
        dist.destroy_process_group()


def test_a_window_cache_is_refused() -> None:
    model = RecurrentTransformer(RecurrentTransformerConfig(n_layers=1, d_model=16, n_heads=2, vocab_size=8, window=4))
    with pytest.raises(ConfigError, match=r"cache: got a WindowCache, expected a KVCache"):
        model(torch.zeros(1, 3, dtype=torch.long), cache=WindowCache(1, 4))
