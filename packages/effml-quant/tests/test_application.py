import copy
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from effml_quant.casting import fake_quantize
from effml_quant.precision.application import apply_scheme
from effml_quant.precision.linear import MXLinear, mx_linear
from effml_quant.precision.scheme import PrecisionScheme
from effml_shared.errors import ConfigError
from effml_shared.steps import language_model_loss
from effml_shared.transformer import Transformer, TransformerConfig
from torch import nn

MX4 = PrecisionScheme.mx("mxfp4")
EVERYTHING = MX4.replace(norm_affine="mxfp4", softmax="bfloat16", residual="bfloat16", attention="mxfp8_e4m3")
NOTHING = PrecisionScheme(w_fwd=None, a_fwd=None, vector=None)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def batch(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def gradients(model, *args, **kwargs):
    model.zero_grad()
    out = model(*args, **kwargs)
    loss = out.square().sum() if isinstance(out, torch.Tensor) else out.loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_model_is_covered_changed_and_restored_in_place():
    model, x = small(), batch(8, 64)
    parameters, state, types = list(model.parameters()), dict(model.state_dict()), [type(m) for m in model.modules()]
    exact = gradients(model, x)
    handle = apply_scheme(model, EVERYTHING)
    quantised = gradients(model, x)
    assert list(handle.layers) == ["0", "3", "5"]
    assert list(handle.norms) == ["1"]
    assert handle.scheme is EVERYTHING
    assert not same(exact, quantised)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(state)
    assert isinstance(model[0], MXLinear)
    handle.set(None)
    assert same(gradients(model, x), exact)
    with handle.using(EVERYTHING):
        assert same(gradients(model, x), quantised)
    assert handle.scheme is None
    assert same(gradients(model, x), exact)
    handle.restore()
    assert [type(m) for m in model.modules()] == types
    assert same(gradients(model, x), exact)
    handle.set(EVERYTHING)
    assert same(gradients(model, x), quantised)
    handle.set(NOTHING)
    for found, expected in zip(gradients(model, x), exact, strict=True):
        torch.testing.assert_close(found, expected)


def test_using_ends_even_on_an_error():
    handle = apply_scheme(small(), MX4)
    with pytest.raises(KeyError), handle.using(None):
        raise KeyError
    assert handle.scheme is MX4


def test_nothing_outside_of_the_model_is_touched():
    inside, outside, x, heads = small(), nn.Linear(64, 32), batch(8, 64), batch(1, 2, 8, 64)
    functions = {
        "linear": lambda: outside(x),
        "matmul": lambda: torch.matmul(heads, heads.mT),
        "gelu": lambda: F.gelu(x),
        "softmax": lambda: x.softmax(-1),
        "attention": lambda: F.scaled_dot_product_attention(heads, heads, heads),
        "sum": lambda: x + x,
        "norm": lambda: nn.LayerNorm(64)(x),
    }
    before = {name: function() for name, function in functions.items()}
    handle = apply_scheme(inside, EVERYTHING)
    for _ in range(2):
        inside(x)
        assert all(torch.equal(function(), before[name]) for name, function in functions.items())
        handle.restore()


def test_a_teacher_is_the_same_inside_and_outside_of_a_scheme():
    student, teacher, x = small(), small(), batch(8, 64)
    expected = teacher(x)
    handle = apply_scheme(student, None)
    with handle.using(EVERYTHING):
        student(x)
        assert torch.equal(teacher(x), expected)
        assert not torch.equal(student(x), expected)


def test_hooks_stay():
    model, calls = small(), []
    model[0].register_forward_hook(lambda module, args, out: calls.append(out))
    model[0].register_full_backward_hook(lambda module, g_in, g_out: calls.append(g_out[0]))
    apply_scheme(model, MX4)
    gradients(model, batch(8, 64).requires_grad_())
    assert [c.shape for c in calls] == [(8, 32), (8, 32)]
    assert not torch.equal(calls[0], F.linear(batch(8, 64), model[0].weight, model[0].bias))


def test_exempt_layers_and_a_filter():
    model, x = small(), batch(8, 64)
    handle = apply_scheme(model, MX4.replace(exempt=("0", "5"), activation=None))
    assert [model[i].precision_scheme for i in (3,)] == [handle.scheme]
    assert {type(model[i]) for i in (0, 5)} == {nn.Linear}
    assert torch.equal(model[0](x), F.linear(x, model[0].weight, model[0].bias))
    handle.set(MX4)
    assert torch.equal(model[0](x), mx_linear(x, model[0].weight, model[0].bias, MX4))
    handle = apply_scheme(model, MX4, filter=lambda name, module: module.out_features == 4)
    assert list(handle.layers) == ["5"]
    assert type(model[0]) is nn.Linear
    handle = apply_scheme(model, PrecisionScheme(norm_affine="mxfp4", exempt=("1",)))
    assert type(model[1]) is nn.LayerNorm


def test_applying_again_replaces_and_a_copy_is_independent():
    model, x = small(), batch(8, 64)
    apply_scheme(model, EVERYTHING)
    expected = model(x)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), expected)
    handle = apply_scheme(other, None)
    assert not torch.equal(other(x), expected)
    assert torch.equal(model(x), expected)
    handle.restore()
    assert [type(m) for m in other.modules()] == [type(m) for m in small().modules()]


def test_what_cannot_be_covered_is_listed(caplog):
    class Low(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 3, 4))

    replaced = nn.Linear(2, 2)
    replaced.forward = replaced.forward
    model = nn.ModuleDict(
        {
            "conv": nn.Conv1d(2, 2, 1),
            "rnn": nn.GRU(2, 2),
            "attn": nn.MultiheadAttention(4, 2),
            "low": Low(2, 2),
            "experts": Experts(),
            "replaced": replaced,
            "plain": nn.Linear(2, 2),
        }
    )
    with caplog.at_level(logging.WARNING):
        handle = apply_scheme(model, MX4)
    assert list(handle.layers) == ["plain"]
    assert set(handle.uncovered) == {"conv", "rnn", "attn", "attn.out_proj", "low", "experts", "replaced"}
    assert "7 modules keep their own precision" in caplog.text
    assert type(model["attn"].out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear


@pytest.mark.parametrize(
    ("model", "scheme", "message"),
    [
        (nn.ReLU(), MX4, r"model: got one without linear layers"),
        ("model", MX4, r"model: got str, expected an nn.Module"),
        (small(), "mxfp4", r"scheme: got str, expected a PrecisionScheme or None"),
        (small().half(), MX4, r"0.weight: got float16 with vector='bfloat16'"),
    ],
)
def test_what_does_not_fit_is_named(model, scheme, message):
    with pytest.raises(ConfigError, match=message):
        apply_scheme(model, scheme)
    if isinstance(model, nn.Module):
        assert not any(isinstance(m, MXLinear) for m in model.modules())


def test_a_refused_scheme_changes_nothing():
    model = small()
    handle = apply_scheme(model, MX4)
    model.half()
    with pytest.raises(ConfigError, match=r"0.weight: got float16"):
        handle.set(PrecisionScheme())
    assert handle.scheme is MX4


class Folded(nn.Module):
    """Reads its weights itself, as the tiled Recurrent Transformer does, until it is told not to."""

    precision_refusal: str | None = "backend: got 'tiled', expected backend=\"naive\""

    def __init__(self):
        super().__init__()
        self.proj, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)

    def forward(self, x):
        return F.softmax(F.linear(x, self.proj.weight), -1)


@pytest.mark.parametrize(
    ("scheme", "refused"),
    [
        (MX4, True),
        (MX4.replace(exempt=("1.proj",)), False),
        (MX4.replace(exempt=("1.proj",), norm_affine="mxfp4"), True),
        (MX4.replace(exempt=("1.*",), norm_affine="mxfp4"), False),
    ],
)
def test_a_module_that_computes_past_its_parts_refuses_at_once(scheme, refused):
    model = nn.Sequential(nn.Linear(64, 64), Folded())
    handle = apply_scheme(model, None)
    for attempt in (handle.check, handle.set, lambda scheme: apply_scheme(model, scheme)) if refused else ():
        with pytest.raises(ConfigError, match=r"^1\.backend: got 'tiled', expected backend=\"naive\"$"):
            attempt(scheme)
        assert not any(isinstance(m, MXLinear) for m in model.modules())
    if not refused:
        handle.set(scheme)
        assert not isinstance(model[1].proj, MXLinear)
    model[1].precision_refusal = None
    apply_scheme(model, MX4)
    assert isinstance(model[1].proj, MXLinear)


def test_one_linear_layer_is_a_model():
    layer, x = nn.Linear(64, 4), batch(2, 64)
    handle = apply_scheme(layer, MX4)
    assert list(handle.layers) == [""]
    assert torch.equal(layer(x), mx_linear(x, layer.weight, layer.bias, MX4))


@pytest.mark.parametrize("tied", [True, False])
def test_the_shared_transformer_trains(tied):
    model = Transformer(TransformerConfig(n_layers=1, d_model=64, vocab_size=100, tied=tied, qk_norm="head"))
    ids = torch.randint(0, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    handle = apply_scheme(model, EVERYTHING)
    assert {name.rpartition(".")[2] for name in handle.layers} >= {"q_proj", "o_proj", "up_proj", "down_proj"}
    assert len(handle.norms) == 5
    loss, _ = language_model_loss(model, {"input_ids": ids, "labels": ids})
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    with handle.using(None):
        exact, _ = language_model_loss(model, {"input_ids": ids, "labels": ids})
    exact, loss = exact.item(), loss.item()
    assert 0 < abs(exact - loss) < 0.2 * exact


def hugging_face(*names):
    """Return classes of transformers; what it warns of while it loads them is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers")
        return [getattr(module, name) for name in names]


def llama():
    config, model = hugging_face("LlamaConfig", "LlamaForCausalLM")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    return model(config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True))


def gpt2():
    config, model = hugging_face("GPT2Config", "GPT2LMHeadModel")
    torch.manual_seed(0)
    return model(config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0))


@pytest.mark.parametrize(("make", "layers", "norms"), [(llama, 15, 5), (gpt2, 9, 5)])
def test_models_of_hugging_face(make, layers, norms):
    model = make().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    names, exact = list(model.state_dict()), gradients(model, ids, labels=ids, use_cache=False)
    handle = apply_scheme(model, EVERYTHING)
    assert (len(handle.layers), len(handle.norms), dict(handle.uncovered)) == (layers, norms, {})
    quantised = gradients(model, ids, labels=ids, use_cache=False)
    assert not any(torch.equal(a, b) for a, b in zip(exact, quantised, strict=True) if a.ndim)
    assert list(model.state_dict()) == names
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    assert same(gradients(model, ids, labels=ids, use_cache=False), quantised)
    handle.restore()
    assert same(gradients(model, ids, labels=ids, use_cache=False), exact)


def test_the_layers_of_gpt2_store_their_weight_the_other_way():
    model = gpt2()
    layer = model.transformer.h[0].mlp.c_fc
    apply_scheme(model, MX4)
    x = batch(3, 32)
    assert torch.equal(layer(x), mx_linear(x, layer.weight.detach().T.contiguous(), layer.bias, MX4))


def test_ddp_and_fsdp_take_a_covered_model(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model, x = small(), batch(8, 64)
    apply_scheme(model, EVERYTHING)
    expected = gradients(model, x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        assert same(gradients(ddp, x), expected)
        assert list(apply_scheme(ddp, MX4).layers) == ["0", "3", "5"]
        mesh = dist.init_device_mesh("cpu", (1,))
        sharded = copy.deepcopy(model)
        for part in (sharded[0], sharded[3], sharded):
            fully_shard(part, mesh=mesh)
        found = gradients(sharded, x)
        assert same([found[0], *(g.full_tensor() for g in found[1:])], expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 15),
    reason="before torch 2.15 such layers stay out of graphs",
)
def test_a_compiled_model_follows_a_switch():
    model, x = nn.Sequential(nn.Linear(64, 32, bias=False), nn.GELU()), batch(8, 64)
    handle = apply_scheme(model, PrecisionScheme())
    quantised = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), quantised)
    handle.set(None)
    assert torch.equal(compiled(x), model(x))
    handle.set(PrecisionScheme())
    assert torch.equal(compiled(x), quantised)
    assert list(apply_scheme(compiled, None).layers) == ["0"]


def test_weights_are_quantised_from_the_parameter_itself():
    layer, x = nn.Linear(64, 4, bias=False), torch.eye(64)
    apply_scheme(layer, NOTHING.replace(w_fwd="mxfp4"))
    assert torch.equal(layer(x).T, fake_quantize(layer.weight, "mxfp4"))
