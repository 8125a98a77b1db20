from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from effml_shared.errors import ConfigError
from effml_shared.kv_cache import KVCache
from effml_shared.testing.modules import ModuleKit
from effml_shared.transformer import Transformer, TransformerConfig, initialize
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

TINY = TransformerConfig(n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, vocab_size=50, qk_norm="head")
VARIANTS = {
    "rope": TINY,
    "alibi": replace(TINY, position="alibi", norm="layer", mlp="gelu", qk_norm="full", n_kv_heads=None),
    "none": replace(TINY, position="none", norm_position="post", residual_scale="depth", tied=True, mlp="relu"),
}


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest) -> TransformerConfig:
    return VARIANTS[request.param]


def model64(config: TransformerConfig, seed: int = 0) -> Transformer:
    return Transformer(config, seed).double().requires_grad_(False)


def random_ids(batch: int = 2, seq: int = 12, vocab: int = 50, seed: int = 0) -> Tensor:
    return torch.randint(vocab, (batch, seq), generator=torch.Generator().manual_seed(seed))


def logits(model: Transformer, *args: Any, **kwargs: Any) -> Tensor:
    out = model(*args, **kwargs).logits
    assert out is not None
    return out[..., : model.config.vocab_size]


def close(got: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


class TestTransformerConforms(ModuleKit):
    def make(self) -> Transformer:
        return Transformer(TINY)

    def inputs(self) -> dict[str, Any]:
        return {"input_ids": random_ids(), "hidden_states": True}


class TestLossConforms(ModuleKit):
    def make(self) -> Transformer:
        return Transformer(VARIANTS["alibi"])

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 12)
        mask[0, :5] = 0
        return {"input_ids": random_ids(), "labels": random_ids(), "attention_mask": mask, "loss_chunk": 7}


# The mathematics, against numbers and formulas found independently.


def naive_logits(model: Transformer, ids: Tensor) -> Tensor:
    """The model's definition, one row, position and head at a time."""
    config, get = model.config, lambda name: model.get_parameter(name)
    norm: Any = {"rms": F.rms_norm, "layer": F.layer_norm}[config.norm]
    act: Any = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}.get(config.mlp)
    dh, group = config.head_dim, config.n_heads // config.kv_heads

    def normed(x: Tensor, name: str) -> Tensor:
        return norm(x, x.shape[-1:], eps=config.norm_eps) * get(f"{name}.weight")

    def heads(x: Tensor, name: str, count: int) -> Tensor:
        x = normed(x, name) if config.qk_norm == "full" else x
        x = x.view(-1, count, dh)
        x = normed(x, name) if config.qk_norm == "head" else x
        if config.position == "rope":
            for t in range(len(x)):
                angle = t * config.rope_base ** (-2 * torch.arange(dh // 2).double() / dh)
                turn = torch.polar(torch.ones_like(angle), angle)
                z = torch.complex(x[t, :, : dh // 2], x[t, :, dh // 2 :]) * turn
                x = x.clone()
                x[t] = torch.cat([z.real, z.imag], -1)
        return x

    def attention(x: Tensor, at: str) -> Tensor:
        q = heads(x @ get(f"{at}.q_proj.weight").T, f"{at}.q_norm", config.n_heads)
        k = heads(x @ get(f"{at}.k_proj.weight").T, f"{at}.k_norm", config.kv_heads)
        v = (x @ get(f"{at}.v_proj.weight").T).view(-1, config.kv_heads, dh)
        out = torch.zeros_like(q)
        for t in range(len(x)):
            for h in range(config.n_heads):
                last = t + 1 if config.causal else len(x)
                score = k[:last, h // group] @ q[t, h] / math.sqrt(dh)
                if config.position == "alibi":
                    score = score - 2 ** (-8 * (h + 1) / config.n_heads) * (t - torch.arange(last)).abs()
                out[t, h] = score.softmax(0) @ v[:last, h // group]
        return out.flatten(1) @ get(f"{at}.o_proj.weight").T

    def mlp(x: Tensor, at: str) -> Tensor:
        up = x @ get(f"{at}.up_proj.weight").T
        hidden = act(up) if act else F.silu(x @ get(f"{at}.gate_proj.weight").T) * up
        return hidden @ get(f"{at}.down_proj.weight").T

    rows, r = [], config.n_layers**-0.5 if config.residual_scale == "depth" else 1.0
    for row in ids:
        x = get("model.embed_tokens.weight")[row]
        for i in range(config.n_layers):
            at = f"model.layers.{i}"
            for name, f in (("input_layernorm", attention), ("post_attention_layernorm", mlp)):
                inner = f"{at}.{'self_attn' if f is attention else 'mlp'}"
                pre = config.norm_position == "pre"
                x = x + r * (f(normed(x, f"{at}.{name}"), inner) if pre else normed(f(x, inner), f"{at}.{name}"))
        head = "model.embed_tokens.weight" if config.tied else "lm_head.weight"
        rows.append(normed(x, "model.norm") @ get(head).T)
    return torch.stack(rows)[..., : config.vocab_size]


@pytest.mark.parametrize("causal", [True, False])
def test_equals_the_definition(config: TransformerConfig, causal: bool) -> None:
    model = model64(replace(config, causal=causal))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.copy_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
    close(logits(model, random_ids()), naive_logits(model, random_ids()))


@pytest.mark.parametrize("tied", [True, False])
def test_equals_hugging_face_llama(tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = TransformerConfig(
        n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, d_ff=176, vocab_size=128, tied=tied, norm_eps=1e-5
    )
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
        )
    )
    ours = Transformer(config)
    missing, unexpected = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    assert sum(p.numel() for p in ours.parameters()) == 108_864 - tied * 128 * 64
    ids = random_ids(2, 40, 128)
    mask = torch.ones(2, 40)
    mask[0, :7] = 0
    with torch.no_grad():
        close(logits(ours, ids), theirs(ids).logits, atol=2e-5)
        padded = theirs(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0).long()).logits
        close(logits(ours, ids, attention_mask=mask)[mask.bool()], padded[mask.bool()], atol=2e-5)
        sums = ours(ids, labels=ids)
        assert (sums.loss_sum / sums.token_count).item() == pytest.approx(theirs(ids, labels=ids).loss.item(), rel=1e-5)


# What may see what.


def test_causality_is_bitwise(config: TransformerConfig) -> None:
    model, ids = model64(config), random_ids()
    other = ids.clone()
    other[:, 7] = (other[:, 7] + 1) % 50
    assert torch.equal(logits(model, ids)[:, :7], logits(model, other)[:, :7])
    assert not torch.equal(logits(model, ids)[:, 7:], logits(model, other)[:, 7:])


def test_left_padding_changes_nothing(config: TransformerConfig) -> None:
    model, ids = model64(config), random_ids()
    expected = logits(model, ids)
    for pads in range(8):
        padded = torch.cat([random_ids(2, pads, seed=1), ids], 1)
        mask = torch.cat([torch.zeros(2, pads), torch.ones(2, 12)], 1)
        close(logits(model, padded, attention_mask=mask)[:, pads:], expected)


def test_right_padding_changes_nothing(config: TransformerConfig) -> None:
    model, ids = model64(replace(config, causal=False)), random_ids()
    mask = torch.cat([torch.ones(2, 12), torch.zeros(2, 3)], 1)
    close(logits(model, torch.cat([ids, ids[:, :3]], 1), attention_mask=mask)[:, :12], logits(model, ids))


def test_packed_documents_equal_separate_runs(config: TransformerConfig) -> None:
    model, ids = model64(config), random_ids()
    docs = torch.tensor([[0] * 5 + [1] * 7, [3] * 12])
    packed = logits(model, ids, doc_ids=docs)
    close(packed[:1, :5], logits(model, ids[:1, :5]))
    close(packed[:1, 5:], logits(model, ids[:1, 5:]))
    close(packed[1:], logits(model, ids[1:]))
    sums = model(ids, doc_ids=docs, labels=ids)
    parts = [model(part, labels=part) for part in (ids[:1, :5], ids[:1, 5:], ids[1:])]
    assert sums.token_count == sum(part.token_count for part in parts) == 4 + 6 + 11
    close(sums.loss_sum, sum(part.loss_sum for part in parts))


def test_bidirectional_model_has_no_order_but_the_positions() -> None:
    model, ids = model64(replace(TINY, causal=False)), random_ids()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    close(logits(model, ids[:, order], position_ids=order[None]), logits(model, ids)[:, order])


# Cache.


def test_every_split_of_prompt_and_decoding(config: TransformerConfig) -> None:
    model, ids = model64(config), random_ids()
    expected = logits(model, ids)
    for sizes in ([12], [1] * 12, [5, 7], [11, 1], [3, 4, 1, 4], [1, 11]):
        cache, start = model.new_cache(12), 0
        for size in sizes:
            close(logits(model, ids[:, start : start + size], cache=cache), expected[:, start : start + size])
            start += size
            assert cache.length == start


def test_padded_prompt_then_chunks(config: TransformerConfig) -> None:
    model, ids = model64(config), random_ids(1)
    cache = model.new_cache()
    prompt = torch.cat([random_ids(1, 4, seed=1), ids[:, :5]], 1)
    model(prompt, attention_mask=torch.tensor([[0] * 4 + [1] * 5]), cache=cache)
    parts = [logits(model, ids[:, 5:6], cache=cache), logits(model, ids[:, 6:9], cache=cache)]
    close(torch.cat(parts, 1), logits(model, ids[:, :9])[:, 5:])


def test_crop_and_select_rewind_and_permute(config: TransformerConfig) -> None:
    model, ids = model64(config), random_ids()
    cache = model.new_cache()
    logits(model, ids[:, :6], cache=cache)
    logits(model, random_ids(2, 9, seed=1), cache=cache)
    cache.crop(6)
    cache.select(torch.tensor([1, 0, 1]))
    close(logits(model, ids[[1, 0, 1], 6:], cache=cache), logits(model, ids[[1, 0, 1]])[:, 6:])


# Inputs, outputs, loss.


def test_condition_and_embeddings(config: TransformerConfig) -> None:
    model, ids = model64(config), random_ids()
    embeds = model.get_parameter("model.embed_tokens.weight")[ids]
    condition = torch.randn(2, 1, 32, dtype=torch.float64)
    close(logits(model, inputs_embeds=embeds), logits(model, ids))
    close(logits(model, ids, condition=condition), logits(model, inputs_embeds=embeds + condition))


def test_loss_is_the_shifted_cross_entropy(config: TransformerConfig) -> None:
    model, ids = Transformer(config).double(), random_ids()
    labels = ids.clone()
    labels[0, 3:6] = -100
    full = F.cross_entropy(logits(model, ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    out = model(ids, labels=labels, loss_chunk=5)
    assert out.logits is None
    assert out.token_count.item() == 22 - 3
    close(out.loss_sum, full)
    parameters = list(model.parameters())
    for got, expected in zip(
        torch.autograd.grad(out.loss_sum, parameters), torch.autograd.grad(full, parameters), strict=True
    ):
        close(got, expected)


def test_padding_never_counts_and_bidirectional_loss_is_in_place() -> None:
    ids = random_ids()
    mask = torch.ones(2, 12)
    mask[0, :4] = 0
    assert model64(TINY)(ids, labels=ids, attention_mask=mask).token_count == 7 + 11
    model = model64(replace(TINY, causal=False))
    out = model(ids, labels=ids, attention_mask=mask)
    kept = mask.bool()
    close(out.loss_sum, F.cross_entropy(logits(model, ids, attention_mask=mask)[kept], ids[kept], reduction="sum"))
    assert out.token_count == 20


def test_padded_vocabulary_is_never_drawn_and_logits_are_kept_from_the_end() -> None:
    model, ids = model64(TINY), random_ids()
    out = model(ids, logits_to_keep=3, hidden_states=True)
    assert out.logits.shape == (2, 3, 128)
    assert (out.logits[..., 50:] == -math.inf).all()
    close(out.logits[..., :50], logits(model, ids)[:, -3:])
    assert [state.shape for state in out.hidden_states] == [(2, 12, 32)] * 3
    close(out.hidden_states[-1] @ model.get_parameter("lm_head.weight").T[:, :50], logits(model, ids))


def test_per_example_gradients_by_vmap() -> None:
    model, ids = Transformer(TINY).double(), random_ids(3)
    parameters: dict[str, Tensor] = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (row[None],), {"labels": row[None]}).loss_sum

    with sdpa_kernel(SDPBackend.MATH):  # the fused kernel of the CPU works too, in a loop and with a warning
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    whole = torch.autograd.grad(model(ids, labels=ids).loss_sum, list(parameters.values()))
    for name, expected in zip(parameters, whole, strict=True):
        close(each[name].sum(0), expected)


# Initialisation.


@pytest.mark.parametrize("init", ["mitchell", "normal"])
def test_initial_scales(init: str) -> None:
    config = TransformerConfig(n_layers=2, d_model=512, n_heads=8, vocab_size=512, init=init)
    for name, parameter in Transformer(config).named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter))
            continue
        writes = "o_proj" in name or "down_proj" in name
        target = 0.02 / math.sqrt(4 if writes else 1)
        if init == "mitchell":
            layer = int(name.split(".")[2]) if writes else -0.5
            target = 0.9866 / math.sqrt(parameter.shape[1] * 2 * (layer + 1))
            assert parameter.abs().max() <= 3.0001 * target / 0.9866
        assert parameter.std().item() == pytest.approx(target, rel=0.02), name


@pytest.mark.parametrize("init", ["mitchell", "normal"])
def test_initial_loss_is_that_of_normal_logits(init: str) -> None:
    config = TransformerConfig(n_layers=2, d_model=256, vocab_size=1000, init=init)
    ids = random_ids(4, 64, 1000)
    out = Transformer(config)(ids, labels=ids)
    variance = 0.9866**2 if init == "mitchell" else 256 * 0.02**2  # of a normed state times a row of the head
    assert (out.loss_sum / out.token_count).item() == pytest.approx(math.log(1000) + variance / 2, abs=0.15)


def test_draws_depend_on_seed_name_and_shape_only() -> None:
    before = torch.get_rng_state()
    small, deep = Transformer(TINY), Transformer(replace(TINY, n_layers=3, position="alibi"))
    assert torch.equal(torch.get_rng_state(), before)
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, deep.get_parameter(name))
    head = small.get_parameter("lm_head.weight")
    assert not torch.equal(head, Transformer(TINY, seed=1).get_parameter("lm_head.weight"))
    half = Transformer(TINY).bfloat16()
    half.reset_parameters()
    assert torch.equal(half.get_parameter("lm_head.weight"), head.bfloat16())
    biased = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(4)})
    torch.nn.init.ones_(biased.get_parameter("norm.bias"))
    initialize(biased, TINY, 0)
    assert not biased.get_parameter("norm.bias").any()


def test_meta_then_reset_equals_direct() -> None:
    with torch.device("meta"):
        model = Transformer(TINY, seed=3)
    model.to_empty(device="cpu").reset_parameters(3)
    for name, parameter in Transformer(TINY, seed=3).named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


def test_ddp_and_fsdp2_start_and_learn_as_the_whole(tmp_path: Path) -> None:
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("FSDP2 on the CPU needs torch.distributed with gloo: not in this build")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole, ids = Transformer(TINY), random_ids()
    whole(ids, labels=ids, loss_chunk=5).loss_sum.backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(Transformer(TINY))
        parallel(ids, labels=ids, loss_chunk=5).loss_sum.backward()
        for expected, got in zip(whole.parameters(), parallel.parameters(), strict=True):
            torch.testing.assert_close(got.grad, expected.grad, rtol=0, atol=0)
        with torch.device("meta"):
            model: Any = Transformer(TINY)
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model["layers"]:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu").reset_parameters()
        model(ids, labels=ids, loss_chunk=5).loss_sum.backward()
        for name, expected in whole.named_parameters():
            parameter = model.get_parameter(name)
            assert torch.equal(parameter.full_tensor(), expected)
            torch.testing.assert_close(parameter.grad.full_tensor(), expected.grad, rtol=0, atol=1e-6)
    finally:
        dist.destroy_process_group()


# Refusals.


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "got both or neither"),
        ({"input_ids": random_ids(), "inputs_embeds": torch.zeros(2, 12, 32)}, "got both or neither"),
        ({"input_ids": torch.tensor([[0, 50]])}, "input_ids: got 0 to 50, expected 0 to 49"),
        ({"input_ids": torch.tensor([[0, -1]])}, "input_ids: got -1 to 0, expected 0 to 49"),
        (
            {"input_ids": torch.arange(4)},
            r"input_ids: got torch.int64 of shape \(4,\), expected int64 or int32 \(batch, seq",
        ),
        ({"input_ids": torch.zeros(1, 2, 3).long()}, r"input_ids: got torch.int64 of shape \(1, 2, 3\)"),
        ({"input_ids": torch.tensor(3)}, r"input_ids: got torch.int64 of shape \(\)"),
        ({"input_ids": torch.zeros(2, 3)}, "input_ids: got torch.float32"),
        ({"input_ids": torch.zeros(2, 3, dtype=torch.bool)}, "input_ids: got torch.bool"),
        ({"inputs_embeds": torch.zeros(2, 32)}, r"inputs_embeds: got .*\(2, 32\), expected floating .*d_model=32"),
        ({"inputs_embeds": torch.zeros(2, 3, 31)}, r"inputs_embeds: got .*\(2, 3, 31\)"),
        ({"inputs_embeds": torch.zeros(2, 3, 32).long()}, "inputs_embeds: got torch.int64"),
        ({"input_ids": random_ids(), "labels": torch.zeros(2, 12)}, "labels: got torch.float32, expected int64"),
        ({"input_ids": random_ids(), "cache": KVCache(2, 11)}, "cache: got 12 tokens, expected at most max_len=11"),
        ({"input_ids": random_ids(), "attention_mask": torch.ones(2, 11)}, r"attention_mask: got shape \(2, 11\)"),
        (
            {"input_ids": random_ids(), "condition": torch.zeros(12, 32)},
            r"condition: got shape \(12, 32\), expected \(2, 12",
        ),
        ({"input_ids": random_ids(), "position_ids": torch.arange(13)[None]}, r"position_ids: got shape \(1, 13\)"),
        ({"input_ids": random_ids(), "labels": random_ids(1)}, r"labels: got shape \(1, 12\)"),
        ({"input_ids": random_ids(), "doc_ids": random_ids(), "cache": KVCache(2)}, "cache: got doc_ids"),
        ({"input_ids": random_ids(), "cache": KVCache(3)}, "cache: got one of 3 layers, expected n_layers=2"),
        (
            {"input_ids": random_ids(), "attention_mask": (random_ids() * 0 + 1).tril(4), "cache": KVCache(2)},
            "attention_mask: got padding on the right",
        ),
    ],
)
def test_forward_refuses(inputs: dict[str, Any], message: str) -> None:
    with torch.no_grad(), pytest.raises(ConfigError, match=message):
        model64(TINY)(**inputs)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_an_empty_batch_is_no_error(shape: tuple[int, int]) -> None:
    model, ids = model64(TINY), torch.zeros(shape, dtype=torch.int64)
    assert model(ids).logits.shape == (*shape, TINY.rows)
    output = model(ids, labels=ids)
    assert (output.loss_sum.item(), output.token_count.item()) == (0.0, 0)
