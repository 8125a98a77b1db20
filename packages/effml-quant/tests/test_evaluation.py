import copy

import pytest
import torch
from effml_quant import Quantizer, fake_quantize
from effml_quant.qat import LSQ, attach, cast_weights, evaluate, placed_weights, quantized_weights
from effml_shared.errors import ConfigError
from torch import nn

INT4 = Quantizer("int4", granularity="channel")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def loss(model):
    return model(X).square().mean()


def test_the_cast_is_in_place_within_and_the_originals_are_back_bitwise_whatever_happens():
    model = network()
    model[0].weight.data[0, 0] = -0.0
    before, ids = copy.deepcopy(model.state_dict()), [id(p) for p in model.parameters()]

    def fail(model):
        assert torch.equal(model[2].weight, fake_quantize(before["2.weight"], INT4))
        assert torch.equal(model[2].bias, before["2.bias"])
        raise FileNotFoundError

    with pytest.raises(FileNotFoundError):
        evaluate(model, fail, INT4)
    assert [id(p) for p in model.parameters()] == ids
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32))


def test_one_evaluation_for_every_cast():
    model = network()
    reference = copy.deepcopy(model)
    for layer in (reference[0], reference[2]):
        layer.weight.data = fake_quantize(layer.weight.data, INT4)
    assert evaluate(model, loss, INT4) == loss(reference).item()
    g = torch.Generator().manual_seed(1)
    draws = [evaluate(model, loss, INT4, "rr", generator=g) for _ in range(3)]
    assert len(set(draws)) == 3
    g.manual_seed(1)
    assert evaluate(model, loss, INT4, "rr", 3, generator=g) == pytest.approx(sum(draws) / 3)
    on_grid = cast_weights(model, INT4)
    with placed_weights(model, on_grid):
        assert evaluate(model, loss, INT4, "rr", 2) == loss(reference).item()  # what is on the grid stays there
    only = evaluate(model, loss, INT4, filter=lambda name, module: name == "0")
    assert only not in (loss(model).item(), loss(reference).item())


def test_a_method_with_scales_of_its_own_is_evaluated_alike():
    model = network()
    attached = attach(model, LSQ(INT4))
    with torch.no_grad():
        model[0].weight_step.mul_(1.7)
    expected, deployed = loss(model).item(), attached.deployed()
    attached.restore()
    with placed_weights(model, deployed):
        assert loss(model).item() == expected


def test_tied_weights_are_placed_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    with quantized_weights(model, INT4):
        assert model[1].weight is model[0].weight
        assert torch.equal(model[0].weight, fake_quantize(model[0].weight, INT4))


def test_errors():
    model = network()
    with pytest.raises(ConfigError, match=r"cast: got 'nearest'"):
        evaluate(model, loss, INT4, "nearest")
    with pytest.raises(ConfigError, match=r"draws: got 2, expected 1"):
        evaluate(model, loss, INT4, draws=2)
    with (
        pytest.raises(ConfigError, match=r"1.weight: got a weight of shape \(2,\).*no such parameter"),
        placed_weights(model, {"1.weight": torch.zeros(2)}),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"0.weight: got a weight of shape \(2,\).*\(8, 6\)"),
        placed_weights(model, {"0.weight": torch.zeros(2)}),
    ):
        pass
