"""Agreement with torchao, bit by bit where it follows the same rule; and each case where it does not, and why."""

from __future__ import annotations

import logging
import math
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from effml_quant import Quantizer, fake_quantize
from effml_quant.casting import quantize_blocks
from effml_quant.qtensor import quantize
from effml_quant.scales import tensor_scale
from torch import Tensor

NAMES = {
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp4": torch.float4_e2m1fn_x2,
}
RULES = ("floor", "rceil", "ceil", "even")


@pytest.fixture(scope="module")
def ao() -> SimpleNamespace:
    """Return torchao's modules; importing it warns and logs."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
            from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor
            from torchao.quantization import quant_primitives
    finally:
        logging.disable(logging.NOTSET)
    modules: dict[str, ModuleType] = {"mx": mx_tensor, "nv": nvfp4_tensor, "primitives": quant_primitives}
    return SimpleNamespace(**modules)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def to_mx(ao: SimpleNamespace, x: Tensor, name: str, rule: str) -> tuple[Tensor, Tensor]:
    """Return torchao's scale bytes and the values it decodes, in float32."""
    scale, data = ao.mx.to_mx(x.contiguous(), NAMES[name], 32, ao.mx.ScaleCalculationMode(rule))
    values = ao.mx.to_dtype(data, scale, NAMES[name], 32, torch.float32)
    return scale.view(torch.uint8), values


def ours(x: Tensor, name: str, rule: str) -> tuple[Tensor, Tensor]:
    q = Quantizer(name, scale_rule=rule)
    return quantize_blocks(x, q).scales.view(torch.uint8), quantize(x, q).dequantize(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", NAMES)
def test_scale_bytes_and_values(ao, name, rule, dtype):
    spread = torch.exp2(torch.arange(-40.0, 40.0)).repeat_interleave(8)[:, None]
    for x in (
        normal(512, 128, dtype=dtype),
        (normal(640, 64, seed=1) * spread).to(dtype),
        torch.zeros(2, 32, dtype=dtype),
    ):
        theirs, mine = to_mx(ao, x, name, rule), ours(x, name, rule)
        assert torch.equal(theirs[0], mine[0])
        assert torch.equal(theirs[1], mine[1])


@pytest.mark.parametrize("rule", RULES)
def test_nan_poisons_the_block_in_both(ao, rule):
    x = normal(2, 32)
    x[0, 3] = math.nan
    for theirs, mine in zip(to_mx(ao, x, "mxfp8_e4m3", rule), ours(x, "mxfp8_e4m3", rule), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=0, atol=0, equal_nan=True)


def test_an_infinity_keeps_a_finite_scale_there_and_its_neighbours_vanish(ao):
    """Here it makes its block NaN, as microxcaling does: a block that is silently zero is the worse surprise."""
    x = normal(1, 32)
    x[0, 3] = math.inf
    assert [int(to_mx(ao, x, "mxfp8_e4m3", rule)[0]) for rule in ("floor", "rceil")] == [247, 254]
    values = to_mx(ao, x, "mxfp8_e4m3", "floor")[1][0]
    assert not bool(values[torch.arange(32) != 3].any())
    assert [int(ours(x, "mxfp8_e4m3", rule)[0]) for rule in ("floor", "rceil")] == [255, 255]
    assert bool(ours(x, "mxfp8_e4m3", "floor")[1].isnan().all())


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp4"])
def test_rceil_one_ulp_above_a_largest_value_is_missed_there(ao, name):
    """ceil(log2(a / max)) in float32 rounds the quotient to a power of two; here bits decide."""
    largest = Quantizer(name).format.max
    x = torch.zeros(60, 32)
    x[:, 0] = torch.nextafter(largest * torch.exp2(torch.arange(-30.0, 30.0)), torch.tensor(math.inf))
    theirs, mine = to_mx(ao, x, name, "rceil")[0].int(), ours(x, name, "rceil")[0].int()
    exact = torch.arange(-30, 30)[:, None] + 1 + 127
    assert torch.equal(mine, exact.int())
    assert bool((theirs < mine).any())
    assert bool((theirs >= mine - 1).all())


def test_byte_zero_halves_values_there_under_floor(ao):
    """It encodes with 2^-126 and decodes with 2^-127; under rceil such blocks become zero."""
    x = torch.zeros(1, 32)
    x[0, :2] = torch.tensor([2.0**-126, 2.0**-127])
    scale, values = to_mx(ao, x, "mxfp4", "floor")
    assert int(scale) == 0
    assert torch.equal(values, x / 2)
    assert torch.equal(ours(x, "mxfp4", "floor")[1], x)
    assert not bool(to_mx(ao, x, "mxfp4", "rceil")[1].any())
    assert torch.equal(ours(x, "mxfp4", "rceil")[1], x)


def test_a_length_that_32_does_not_divide_is_refused_there(ao):
    with pytest.raises(AssertionError):
        to_mx(ao, normal(2, 33), "mxfp4", "floor")
    assert fake_quantize(normal(2, 33), "mxfp4").shape == (2, 33)


def test_packed_nibbles_have_the_same_order(ao):
    x = normal(8, 64)
    data = ao.mx.to_mx(x, torch.float4_e2m1fn_x2, 32)[1]
    assert torch.equal(data.view(torch.uint8), quantize(x, "mxfp4").codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("two_level", [False, True])
def test_nvfp4(ao, two_level, dtype):
    x = normal(256, 128, dtype=dtype) * torch.exp2(torch.arange(256.0) / 32 - 4)[:, None].to(dtype)
    q = Quantizer("nvfp4", recipe="torchao")
    total = tensor_scale(x.abs().amax(), q) if two_level else None
    if two_level:
        assert torch.equal(total, ao.nv.per_tensor_amax_to_scale(x.abs().amax()))
    scales, data = ao.nv.nvfp4_quantize(x, 16, total)
    mine = quantize(x, q, global_scale=total)
    assert torch.equal(mine.codes, data)
    assert torch.equal(mine.scales.view(torch.uint8), scales.view(torch.uint8))
    theirs = ao.nv.NVFP4Tensor.to_nvfp4(x, 16, total).dequantize(dtype)
    assert torch.equal(mine.dequantize(), theirs)


def test_nvfp4_blocks_of_zeros_have_the_smallest_normal_scale_in_both(ao):
    scales, data = ao.nv.nvfp4_quantize(torch.zeros(1, 16))
    mine = quantize(torch.zeros(1, 16), "nvfp4", recipe="torchao")
    assert float(scales.float()) == float(mine.scales.float()) == 2.0**-6
    assert torch.equal(data, mine.codes)


def affine(
    ao: SimpleNamespace, x: Tensor, kind: str, low: int, high: int, block: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return torchao's codes and values of plain integers."""
    p, dtype = ao.primitives, torch.int8 if low < 0 else torch.uint8
    mapping = getattr(p.MappingType, kind)
    scale, zero = p.choose_qparams_affine(x, mapping, block, dtype, low, high, eps=0.0, scale_dtype=torch.float32)
    codes = p.quantize_affine(x, block, scale, zero, dtype, low, high)
    return codes, p.dequantize_affine(codes, block, scale, zero, dtype, low, high, output_dtype=torch.float32)


@pytest.mark.parametrize(("name", "low", "high"), [("int4", -8, 7), ("int8", -128, 127)])
@pytest.mark.parametrize("block", [(1, 128), (1, 32)])
def test_integers_over_all_codes(ao, name, low, high, block):
    """They multiply by 1 / scale, here is a division: codes differ at ties, where each block's largest value lies."""
    x = normal(256, 128)
    codes, values = affine(ao, x, "SYMMETRIC", low, high, block)
    mine = quantize(x, name, block_size=block[1], recipe="torchao")
    differ = mine.unpack() != codes
    quotient = (x.double().unflatten(1, (-1, block[1])) / mine.scales.double()[..., None]).flatten(1).abs()
    assert bool(((quotient[differ] % 1 - 0.5).abs() < 2e-5).all())
    assert int((mine.unpack().int() - codes.int()).abs().max()) == 1
    torch.testing.assert_close(mine.dequantize()[~differ], values[~differ], rtol=3e-7, atol=0)


@pytest.mark.parametrize(("name", "high"), [("int4", 15), ("int8", 255)])
def test_asymmetric_integers(ao, name, high):
    x = normal(256, 128) + 0.5
    codes, values = affine(ao, x, "ASYMMETRIC", 0, high, (1, 64))
    mine = quantize(x, name, block_size=64, recipe="asymmetric")
    differ = mine.unpack() != codes
    assert float(differ.float().mean()) < 1e-4
    torch.testing.assert_close(mine.dequantize()[~differ], values[~differ], rtol=3e-7, atol=0)


def test_the_symmetric_range_without_the_least_code_is_not_torchaos(ao):
    """torchao's range of int4 is amax / 7.5 over -8 .. 7, which clips the largest positive value."""
    x = torch.tensor([[7.0, -3.0, 1.0, 0.0]])
    values = affine(ao, x, "SYMMETRIC", -8, 7, (1, 4))[1]
    assert float(values[0, 0]) < 7
    assert fake_quantize(x, "int4", granularity="channel")[0].tolist() == [7, -3, 1, 0]
