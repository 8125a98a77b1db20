import pytest
import torch
from effml_quant import Quantizer, load_quantized, save_quantized
from effml_quant.qat import LSQ, RAT, STE, attach, cast_weights, gptq, to_quantized
from effml_quant.qat.export import with_scales
from effml_shared.errors import ConfigError
from torch import nn

QUANTIZERS = [
    Quantizer("int4", granularity="channel"),
    Quantizer("int4", granularity="tensor"),
    Quantizer("int3", granularity=("group", 7), recipe="torchao"),
    Quantizer("int8", granularity="channel"),
    Quantizer("fp4", granularity="channel"),
    Quantizer("mxfp4"),
    Quantizer("mxfp6_e3m2", axis=0),
    Quantizer("mxfp8_e4m3"),
    Quantizer("nvfp4"),
]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)
def test_codes_mean_the_weights_that_were_evaluated(quantizer):
    model, x = network(), torch.randn(64, 33, generator=torch.Generator().manual_seed(1))
    for name, weight in cast_weights(model, quantizer).items():
        made = to_quantized(model, quantizer)[name]
        assert torch.equal(made.dequantize(), weight)
        assert torch.equal(with_scales(weight, made.scales, quantizer, made.global_scale).codes, made.codes)
    weights = gptq(model, quantizer, [x])
    exported = to_quantized(model, quantizer, weights=weights)
    assert all(torch.equal(exported[name].dequantize(), weight) for name, weight in weights.items())


@pytest.mark.parametrize("method", [STE, RAT, LSQ])
@pytest.mark.parametrize(
    "quantizer", [QUANTIZERS[0], QUANTIZERS[1], QUANTIZERS[4], Quantizer("int4", recipe="torchao")], ids=str
)
def test_a_method_exports_what_it_deploys(method, quantizer, tmp_path):
    model = network()
    attached = attach(model, method(quantizer))
    deployed = attached.deployed()
    save_quantized(tmp_path / "weights.safetensors", attached.quantized())
    loaded, _ = load_quantized(tmp_path / "weights.safetensors")
    assert loaded.keys() == deployed.keys()
    assert all(torch.equal(loaded[name].dequantize(), weight) for name, weight in deployed.items())


def test_what_does_not_fit_is_refused():
    model = network()
    with pytest.raises(ConfigError, match=r"weights: got None for 2.weight, expected torch.Size\(\[3, 8\]\)"):
        to_quantized(model, "int4", weights={"0.weight": torch.zeros(8, 33)})
    with pytest.raises(ConfigError, match=r"scales: got shape \(3,\), expected \(1, 1\)"):
        with_scales(torch.zeros(2, 3), torch.ones(3), Quantizer("int4"))
    with pytest.raises(ConfigError, match=r"quantizer: got 'asymmetric'"):
        with_scales(torch.zeros(2, 3), torch.ones(1, 1), Quantizer("int4", recipe="asymmetric"))
