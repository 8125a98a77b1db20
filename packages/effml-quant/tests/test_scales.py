"""Scales of blocks: exponents against exact arithmetic, E8M0 against torch, NVFP4 and integers against worked cases."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from effml_quant import Quantizer, formats
from effml_quant.scales import block_scale, decode_factor, exponent_of, tensor_scale
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

F64 = torch.float64
MX = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8")
RULES = ("floor", "rceil", "ceil", "even", "bump")


def exact_exponent(amax: float, name: str, rule: str) -> int:
    """Compute the rule in rational numbers, from its definition."""
    fmt, a = formats[name], Fraction(amax)
    below = math.frexp(amax)[1] - 1
    if rule == "floor":
        return below - fmt.emax
    if rule == "ceil":
        return below + (a > Fraction(2) ** below) - fmt.emax
    if rule == "even":  # round the mantissa to m bits, half up, then take the exponent
        ulp = Fraction(2) ** (below - fmt.man_bits)
        rounded = (a / ulp + Fraction(1, 2)).__floor__() * ulp
        return below + (rounded >= Fraction(2) ** (below + 1)) - fmt.emax
    least = below - fmt.emax - 2
    while a > Fraction(fmt.max) * Fraction(2) ** least:
        least += 1
    return least


def stored(amax: list[float] | Tensor, name: str, **fields) -> list[int]:
    amax = torch.as_tensor(amax, dtype=torch.float32)
    return block_scale(amax, Quantizer(name, **fields)).stored.view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_just_below_a_power_of_two_the_exponent_is_one_less(dtype):
    k = torch.arange(-126, 128)
    amax = torch.nextafter(torch.exp2(k.to(F64)).to(dtype), torch.zeros((), dtype=dtype))
    assert torch.equal(exponent_of(amax, Quantizer("mxint8")), (k - 1).to(torch.int32))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MX)
def test_rules_around_every_threshold(name, rule):
    """One ulp on either side of a power of two and of the largest value times one, over all of float32."""
    fmt, amax = formats[name], []
    for k in (-149, -140, -126, -125, -60, -3, 0, 1, 3, 60, 100):
        for base in (1.0, fmt.max / 2.0**fmt.emax, 2 - 2.0 ** -(fmt.man_bits + 1)):
            a = torch.tensor(base * 2.0**k)
            amax += [a, torch.nextafter(a, torch.tensor(0.0)), torch.nextafter(a, torch.tensor(math.inf))]
    amax = torch.stack(amax)
    amax = amax[amax > 0]
    q = Quantizer(name, scale_rule=rule)
    wanted = [exact_exponent(a, name, rule) for a in amax.tolist()]
    assert exponent_of(amax.double(), q).tolist() == wanted
    if rule != "even":  # whose rounding of a subnormal float32 is at its own bits
        assert exponent_of(amax, q).tolist() == wanted
    assert stored(amax, name, scale_rule=rule) == [min(max(e, -127), 127) + 127 for e in wanted]


@given(st.floats(2.0**-149, 3.4028234663852886e38, width=32), st.sampled_from(MX), st.sampled_from(RULES))
def test_any_exponent(amax, name, rule):
    assert int(exponent_of(torch.tensor(amax, dtype=F64), Quantizer(name, scale_rule=rule))) == exact_exponent(
        amax, name, rule
    )


@pytest.mark.parametrize("name", MX)
def test_bump_is_rceil_and_saturates_nothing(name):
    generator = torch.Generator().manual_seed(0)
    amax = torch.rand(100_000, generator=generator) * torch.exp2(
        torch.randint(-100, 100, (100_000,), generator=generator)
    )
    rceil = exponent_of(amax, Quantizer(name, scale_rule="rceil"))
    fmt = formats[name]
    floor = torch.frexp(amax.double())[1] - 1 - fmt.emax
    bump = floor + (amax.double() > fmt.max * torch.exp2(floor.double())).int()
    assert torch.equal(rceil, bump.int())
    assert torch.equal(rceil, exponent_of(amax, Quantizer(name, scale_rule="bump")))
    assert float((amax.double() * torch.exp2(-rceil.double())).max()) <= fmt.max


def test_ends_of_the_scale():
    for name in MX:
        for rule in RULES:
            assert stored([0.0, math.inf, math.nan, 1e-45], name, scale_rule=rule) == [0, 255, 255, 0]
    largest = torch.finfo(torch.float32).max
    assert stored([largest], "mxint8", scale_rule="floor") == [254]
    for rule in ("rceil", "ceil", "even"):  # 2^128 is beyond the scale
        assert stored([largest], "mxint8", scale_rule=rule) == [254]
    assert stored([largest], "mxfp4") == [252]


def test_bytes_are_torchs_float8_e8m0():
    codes = torch.arange(256).to(torch.uint8)
    decoded = decode_factor(codes.view(torch.float8_e8m0fnu), Quantizer("mxfp4"))
    assert decoded[:255].double().tolist() == [2.0 ** (e - 127) for e in range(255)]
    assert decoded[255].isnan()


def test_torchs_cast_to_float8_e8m0_is_no_scale_rule():
    """It rounds to the nearest power and drops the sign, so scales are made from bits instead."""
    cast = torch.tensor([2.9, 3.0, -2.0, 0.0]).to(torch.float8_e8m0fnu).float()
    assert cast.tolist() == [2.0, 4.0, 2.0, 2.0**-127]


def test_encoding_and_decoding_factors_are_inverse_powers():
    amax = torch.exp2(torch.arange(-126.0, 128.0))
    scale = block_scale(amax, Quantizer("mxint8"))
    assert bool((scale.encode * scale.decode == 1).all())


def test_tensor_scales():
    te, ao = Quantizer("nvfp4"), Quantizer("nvfp4", recipe="torchao")
    assert tensor_scale(torch.tensor(6.0), te) == 448
    assert tensor_scale(torch.tensor(0.0), te) == 1
    assert tensor_scale(torch.tensor(1e-40), te) == torch.finfo(torch.float32).max
    assert tensor_scale(torch.tensor(2688.0), ao) == 1


def test_block_scales_of_nvfp4():
    amax = torch.tensor([0.95, 6.0, 0.0, 1e-6])
    te = block_scale(amax, Quantizer("nvfp4"), torch.tensor(448.0))
    assert te.stored.view(torch.uint8).tolist() == [0x69, 0x7E, 0, 0]
    assert te.stored.float().tolist() == [72, 448, 0, 0]
    ao = block_scale(amax, Quantizer("nvfp4", recipe="torchao"), torch.tensor(6 / 2688))
    assert ao.stored.float().tolist() == [72, 448, 2.0**-6, 2.0**-6]


def test_integer_scales():
    amax = torch.tensor([7.0, 0.0, math.nan])
    symmetric = block_scale(amax, Quantizer("int4"))
    assert symmetric.decode[:2].tolist() == [1, 1]
    assert symmetric.decode[2].isnan()
    torchao = block_scale(torch.tensor([7.5]), Quantizer("int4", recipe="torchao"))
    assert (float(torchao.decode), torchao.high, torchao.low) == (1, 7, 8)


def test_asymmetric_integers_contain_zero():
    low, high = torch.tensor([0.5, -3.0, -15.0, 0.0]), torch.tensor([15.0, -1.0, 0.0, 0.0])
    scale = block_scale(torch.maximum(low.abs(), high.abs()), Quantizer("int4", recipe="asymmetric"), None, (low, high))
    assert scale.decode.tolist() == pytest.approx([1, 0.2, 1, 1])
    assert scale.zero_point.tolist() == [0, 15, 15, 0]
