import math

import pytest
import torch
from effml_quant.casting import fake_quantize
from effml_quant.formats import formats
from effml_quant.instability.clamping import ClampCount, ClampMeter, count_clamped, find_gains
from effml_quant.instability.proxy import ProxyConfig, StudentTeacher, proxy_loss
from effml_quant.quantizer import Quantizer
from effml_shared.errors import ConfigError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

E4M3 = "mxfp8_e4m3"
BLOCKED = ["mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4"]


def naive(x, fmt, rule="floor"):
    """Count block by block, in Python."""
    found = ClampCount()
    for row in x.reshape(-1, x.shape[-1]).double():
        for block in row.split(32):
            q = fake_quantize(block, fmt, scale_rule=rule)
            top = block.abs().max().item()
            exponent = math.floor(math.log2(top)) - formats[fmt].emax if top else -127
            if rule == "rceil" and top > formats[fmt].max * 2.0**exponent:
                exponent += 1
            largest = formats[fmt].max * 2.0**exponent
            values, codes = len(set(block.tolist())), len({abs(v) if v == 0 else v for v in q.tolist()})
            clamped, last = int((block.abs() > largest).sum()), int((q.abs() == largest).sum())
            found += ClampCount(len(block), 1, clamped, last, values, codes, int(codes == 1 < values))
    return found


@given(st.sampled_from(BLOCKED), st.sampled_from(["floor", "rceil"]), st.integers(1, 70), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_counts_are_those_of_the_definition(fmt, rule, width, seed):
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    assert count_clamped(x, fmt, scale_rule=rule) == naive(x, fmt, rule)


@pytest.mark.parametrize(
    ("low", "high", "value", "clamped"),
    [(0.90, 0.99, 0.875, 32), (1.71, 1.881, 1.75, 24), (1.0, 1.05, 1.0, 0), (0.8836, 0.9037, 0.875, 32)],
)
def test_gains_that_share_a_code(low, high, value, clamped):
    gain = torch.linspace(low, high, 32)
    assert set(fake_quantize(gain, E4M3).tolist()) == {value}
    count = count_clamped(gain, E4M3)
    assert (count.clamped, count.codes, count.collapsed_fraction) == (clamped, 1, 1.0)
    assert count_clamped(gain, E4M3, scale_rule="rceil").clamped == 0


@pytest.mark.parametrize("rule", ["rceil", "bump"])
def test_a_block_is_clamped_or_not_by_its_own_largest_value(rule):
    """A mask over the wrong axis, as in the authors' code, lets the second block decide for the first."""
    mixed = torch.full((32,), 0.95)
    assert fake_quantize(mixed, E4M3)[0] == 0.875
    assert fake_quantize(mixed, E4M3, scale_rule=rule)[0] == 0.9375
    mixed[1] = 1.0
    assert fake_quantize(mixed, E4M3)[0] == 0.9375
    assert count_clamped(mixed, E4M3).clamped == 0
    pair = torch.cat([torch.full((32,), 0.95), torch.ones(32)])
    assert fake_quantize(pair, E4M3, scale_rule=rule).tolist() == [0.9375] * 32 + [1.0] * 32
    assert count_clamped(pair, E4M3).clamped == 32


@pytest.mark.parametrize(
    ("fmt", "clamp", "last"),
    [
        ("mxfp8_e4m3", 1.75, 1.6875),
        ("mxfp8_e5m2", 1.75, 1.625),
        ("mxfp6_e3m2", 1.75, 1.625),
        ("mxfp6_e2m3", 1.875, 1.8125),
        ("mxfp4", 1.5, 1.25),
    ],
)
def test_the_thresholds_of_every_format(fmt, clamp, last):
    def count(value):
        return count_clamped(torch.tensor([value] + [1.0] * 31, dtype=torch.float64), fmt)

    above = 1 + 1e-9
    assert (count(clamp).clamped, count(clamp * above).clamped) == (0, 1)
    assert (count(last / above).last, count(last * above).last) == (0, 1)
    assert count(last).last == (fmt == "mxfp8_e4m3")  # the tie goes to the even code, and only here that is the last


def test_gaussian_fractions_as_published():
    torch.manual_seed(0)
    x = torch.randn(4096, 128)
    want = {"mxfp8_e4m3": (0.00859, 0.01158), "mxfp6_e2m3": (0.00372, 0.00596), "mxfp4": (0.02351, 0.05144)}
    for fmt, (clamped, last) in want.items():
        count = count_clamped(x, fmt)
        assert count.clamp_fraction == pytest.approx(clamped, abs=5e-6)
        assert count.last_fraction == pytest.approx(last, abs=5e-6)


def test_shapes_that_blocks_do_not_divide_and_odd_input():
    assert count_clamped(torch.empty(0, 4), E4M3) == ClampCount()
    assert count_clamped(torch.tensor([0.95]), E4M3) == ClampCount(1, 1, 1, 1, 1, 1, 0)
    assert count_clamped(torch.zeros(40), E4M3) == ClampCount(40, 2, 0, 0, 2, 2, 0)
    assert count_clamped(torch.tensor([0.0, -0.0]), E4M3).codes == 1
    strided = torch.randn(64, 33).T
    assert count_clamped(strided, E4M3) == count_clamped(strided.contiguous(), E4M3)
    assert count_clamped(torch.tensor([math.nan, 1.0]), E4M3).clamped == 0
    spec = Quantizer(E4M3, rounding="stochastic", scale_rule="rceil")
    assert count_clamped(torch.randn(64), spec).clamped == 0
    with pytest.raises(ConfigError, match="format: got bfloat16"):
        count_clamped(torch.ones(4), "bfloat16")
    with pytest.raises(ConfigError, match=r"x: got torch\.int64"):
        count_clamped(torch.ones(4, dtype=torch.int64), E4M3)
    with pytest.raises(ConfigError, match="axis"):
        count_clamped(torch.tensor(1.0), E4M3)


def test_gains_are_found_in_models_and_state_dicts():
    class LlamaRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    model = nn.ModuleDict({"ln_1": nn.LayerNorm(4), "input_layernorm": LlamaRMSNorm(), "proj": nn.Linear(4, 1)})
    model["plain"] = nn.LayerNorm(4, elementwise_affine=False)
    assert set(find_gains(model)) == {"ln_1.weight", "input_layernorm.weight"}
    state = {**model.state_dict(), "h.0.norm.gamma": torch.ones(4), "normal.proj.weight": torch.ones(4, 4)}
    assert set(find_gains(state)) == {"ln_1.weight", "input_layernorm.weight", "h.0.norm.gamma"}


def test_the_meter_counts_gains_weights_and_inputs_and_disturbs_nothing():
    proxy = StudentTeacher(ProxyConfig(32, 2, seed=0))
    batch = proxy.data().next(16)
    rescaled = proxy.student.blocks[0].norm.weight
    with torch.no_grad():
        rescaled.mul_(0.95)
    meter = ClampMeter(proxy.student, E4M3, loss=proxy_loss, detail=True)
    readings = meter.measure(batch)
    assert readings["clamp/gains"] == 0.5
    assert readings["clamp/blocks.0.norm.weight"] == 1.0
    assert readings["codes/blocks.1.norm.weight"] == 1.0
    seen = meter.count(batch)
    block = proxy.student.blocks[0]
    hidden = block.activation(block.up(block.norm(batch["inputs"]))).detach()
    assert seen["inputs"]["blocks.0.down.input"] == count_clamped(hidden, E4M3)
    assert seen["weights"]["blocks.1.up.weight"] == count_clamped(proxy.student.blocks[1].up.weight, E4M3)
    twice = meter.count(batch, batch)["inputs"]["blocks.0.down.input"]
    assert twice == seen["inputs"]["blocks.0.down.input"] + seen["inputs"]["blocks.0.down.input"]
    assert not any(module._forward_pre_hooks for module in proxy.student.modules())
    assert all(parameter.grad is None for parameter in proxy.student.parameters())


def test_the_meter_needs_no_batch_for_parameters_alone():
    meter = ClampMeter(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), every=2, filter=lambda name: False)
    assert meter().keys() == {"clamp/gains", "last/gains", "codes/gains"}
    assert meter() == {}
    with pytest.raises(ConfigError, match="batch: got None"):
        ClampMeter(nn.Linear(2, 2), loss=proxy_loss)()
