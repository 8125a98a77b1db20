import copy

import pytest
import torch
import torch.distributed as dist
from effml_quant import Quantizer, fake_quantize
from effml_quant.qat import LSQ, PTQ, RAT, STE, attach
from effml_shared.errors import ConfigError
from effml_shared.transformer import Transformer, TransformerConfig
from torch import nn

INT4 = Quantizer("int4", granularity="channel")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 2))


X = torch.randn(7, 2, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", [PTQ(INT4), STE(INT4), RAT(INT4), LSQ(INT4)], ids=lambda m: type(m).__name__)
def test_restoring_leaves_the_model_bitwise_as_it_was(method):
    model = network()
    before, classes = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    parameters, output = dict(model.named_parameters()), model(X)
    attached = attach(model, method)
    assert {name: id(p) for name, p in parameters.items()}.items() <= {
        name: id(p) for name, p in model.named_parameters()
    }.items()
    model(X).sum().backward()
    attached.restore()
    attached.restore()  # nothing left to do
    assert [type(m) for m in model.modules()] == classes
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(name.startswith("_cast") for m in model.modules() for name in vars(m))
    assert torch.equal(model(X), output)
    attach(model, method).restore()


def test_the_chosen_layers_compute_with_the_cast_and_show_their_own_weight_outside():
    model, plain = network(), network()
    attached = attach(model, STE(INT4))
    assert list(attached.modules) == ["0", "2", "4"]
    for layer in (plain[0], plain[2], plain[4]):
        layer.weight.data = fake_quantize(layer.weight.data, INT4)
    assert torch.equal(model(X), plain(X))
    assert isinstance(model[2].weight, nn.Parameter)
    assert isinstance(model[2], nn.Linear)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {name: value.tolist() for name, value in attached.deployed().items()} == {
        f"{i}.weight": plain[i].weight.tolist() for i in (0, 2, 4)
    }
    model(X).square().sum().backward()
    plain(X).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # dL/dq, unchanged


def test_an_exception_within_forward_leaves_the_weight_visible():
    model = network()
    attach(model, STE(INT4))
    with pytest.raises(RuntimeError):
        model[2](torch.zeros(1, 4))
    assert isinstance(model[2].weight, nn.Parameter)


def test_layers_that_share_a_weight_all_see_it_cast():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    attached = attach(model, LSQ("int3"))
    assert list(attached.modules) == ["0"]
    assert model[0].weight_step is model[1].weight_step
    x = torch.randn(3, 4)
    q = attached.deployed()["0.weight"]
    assert torch.equal(model(x), x @ q.T @ q.T)
    attached.restore()
    assert torch.equal(model(x), model[1](model[0](x)))
    assert len(list(model.parameters())) == 1


def test_a_copy_goes_its_own_way():
    model = network()
    attach(model, LSQ(INT4))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[2].weight_step.mul_(2)
    assert not torch.equal(model(X), other(X))
    assert other[2].weight_step is not model[2].weight_step


@pytest.mark.parametrize("method", [PTQ(INT4), RAT(INT4), LSQ(INT4)], ids=lambda m: type(m).__name__)
def test_compiles_without_a_graph_break(method):
    model = network()
    attach(model, method)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    ours = compiled(X)
    torch.manual_seed(3)
    plain = model(X)
    torch.testing.assert_close(ours, plain)
    gradients = [torch.autograd.grad(y.sum(), list(model.parameters())) for y in (ours, plain)]
    torch.testing.assert_close(*gradients)


def test_data_parallel_training_is_the_plain_one():
    plain, model = network(), network()
    for m in (plain, model):
        attach(m, LSQ(INT4))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for m in (plain, wrapped):
            optimizer = torch.optim.SGD(m.parameters(), lr=0.1)
            m(X).square().mean().backward()
            optimizer.step()
        with pytest.raises(ConfigError, match=r"model: got one wrapped in DDP"):
            attach(wrapped, STE(INT4))
    finally:
        dist.destroy_process_group()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_someone_elses_models():
    model = Transformer(TransformerConfig(n_layers=1, d_model=16, n_heads=2, d_ff=32))
    ids = torch.arange(12)[None]
    before = model(ids).logits
    attached = attach(model, STE(INT4))
    assert not any("lm_head" in name for name in attached.modules)
    assert not torch.equal(model(ids).logits, before)
    attached.restore()
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(ConfigError, match=r"out_proj: got a layer whose weight nn.MultiheadAttention reads"):
        attach(nn.TransformerEncoderLayer(8, 2, 16), STE(INT4))


def test_what_cannot_be_attached_is_refused_and_nothing_changed():
    model = network()
    attached = attach(model, STE(INT4))
    with pytest.raises(ConfigError, match=r"model: got 0 with a method attached"):
        attach(model, STE(INT4))
    model[2].__class__ = nn.Linear
    with pytest.raises(ConfigError, match=r"model: got a Linear with another class"):
        attached.restore()
    with pytest.raises(ConfigError, match=r"model: got one without weights"):
        attach(nn.ReLU(), STE(INT4))
    with pytest.raises(ConfigError, match=r"format: got 'int44'"):
        STE("int44")
