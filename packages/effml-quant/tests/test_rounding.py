"""Rounding, coding and noise of single elements, against brute force over the enumerated grid."""

from __future__ import annotations

import math

import pytest
import torch
from effml_quant import Format, formats
from effml_quant.rounding import decode, encode, floor_power, power_of_two, round_magnitude, uniform
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

F64 = torch.float64
BLOCKED = [name for name in formats if name != "bfloat16"]
SMALL_FLOAT = Format.floating("e3m3", 3, 3, specials="nan")
FP16 = Format.floating("fp16", 5, 10, specials="ieee", scale="none", block=None)


def saturated(z: Tensor, fmt: Format, rounding: str, noise: Tensor | None = None) -> Tensor:
    return round_magnitude(z, fmt, rounding, noise).clamp(max=fmt.max)


def nearest(z: Tensor, fmt: Format, rounding: str) -> Tensor:
    """Search the grid: the nearest value, ties to the even code, away from zero, or the largest value below."""
    grid = torch.tensor(fmt.grid, dtype=F64)
    below = (torch.searchsorted(grid, z.double(), right=True) - 1).clamp(0, len(grid) - 1)
    above = (below + 1).clamp(max=len(grid) - 1)
    if rounding == "toward_zero":
        return grid[below]
    down, up = (z.double() - grid[below]).abs(), (grid[above] - z.double()).abs()
    tie = (below % 2 == 1) if rounding == "rne" else torch.ones_like(below, dtype=torch.bool)
    return torch.where((up < down) | ((up == down) & tie), grid[above], grid[below])


def magnitudes(fmt: Format, dtype: torch.dtype) -> Tensor:
    """Ten thousand magnitudes, every grid point and midpoint, and their neighbours."""
    generator = torch.Generator().manual_seed(1)
    grid = torch.tensor(fmt.grid, dtype=F64)
    random = torch.rand(10_000, dtype=F64, generator=generator) * fmt.max * 1.5
    small = random * torch.exp2(-20 * torch.rand(10_000, dtype=F64, generator=generator))
    exact = torch.cat([grid, (grid[1:] + grid[:-1]) / 2]).to(dtype)
    near = [torch.nextafter(exact, torch.tensor(end, dtype=dtype)) for end in (0.0, math.inf)]
    return torch.cat([random.to(dtype), small.to(dtype), exact, *near])


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("rounding", ["rne", "away", "toward_zero"])
@pytest.mark.parametrize("fmt", [*(formats[name] for name in BLOCKED), SMALL_FLOAT], ids=lambda fmt: fmt.name)
def test_the_nearest_of_the_grid(fmt, rounding, dtype):
    z = magnitudes(fmt, dtype)
    got = saturated(z, fmt, rounding)
    assert torch.equal(got.double(), nearest(z, fmt, rounding))


def test_ties_of_e2m1_go_to_even_codes():
    z = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 5.1])
    assert saturated(z, formats["mxfp4"], "rne").tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert saturated(z, formats["mxfp4"], "away").tolist() == [0.5, 1, 1.5, 2, 3, 4, 6, 6]
    assert saturated(z, formats["mxfp4"], "toward_zero").tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 4]


@pytest.mark.parametrize(("name", "dtype"), [("mxfp8_e4m3", torch.float8_e4m3fn), ("mxfp8_e5m2", torch.float8_e5m2)])
def test_float8_as_torch_casts_it(name, dtype):
    generator = torch.Generator().manual_seed(2)
    fmt = formats[name]
    z = torch.randn(100_000, generator=generator) * torch.exp2(torch.randint(-20, 12, (100_000,), generator=generator))
    theirs = z.clamp(-fmt.max, fmt.max).to(dtype)
    p = saturated(z.abs(), fmt, "rne")
    assert torch.equal(encode(p, z.signbit(), fmt).view(dtype).view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize(("fmt", "dtype"), [(formats["bfloat16"], torch.bfloat16), (FP16, torch.float16)])
def test_half_precision_as_torch_casts_it(fmt, dtype):
    generator = torch.Generator().manual_seed(3)
    low, high = (-133, 128) if dtype == torch.bfloat16 else (-25, 16)
    z = torch.randn(50_000, generator=generator).abs()
    z = (z * torch.exp2(torch.randint(low, high, (50_000,), generator=generator))).clamp(max=fmt.max)
    assert torch.equal(saturated(z, fmt, "rne"), z.to(dtype).float())
    assert torch.equal(saturated(z.double(), fmt, "rne").float(), z.to(dtype).float())


@pytest.mark.parametrize("fmt", [*(formats[name] for name in formats), FP16], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("rounding", ["rne", "away", "toward_zero", "stochastic"])
def test_whatever_lies_above_saturates(fmt, dtype, rounding):
    """The sum that rounds must not overflow: NVFP4 blocks of scale 0 bring such z."""
    last = torch.finfo(dtype).max
    powers = torch.exp2(torch.arange(fmt.emax + 1, math.frexp(last)[1], dtype=F64))
    z = torch.cat([powers, torch.tensor([last], dtype=F64)]).to(dtype)
    assert bool((saturated(z, fmt, rounding, torch.full_like(z, 0.5)) == fmt.max).all())


@pytest.mark.parametrize(
    ("name", "z", "mean", "tolerance", "variance"),
    [
        ("mxfp4", 0.8, 0.8, 0.002, 0.06),
        ("mxfp4", 4.5, 4.5, 0.008, 0.75),
        ("mxfp8_e4m3", 300.0, 300.0, 0.15, 240.0),
        ("mxfp4", 7.0, 6.0, 0.0, 0.0),
        ("mxint8", 0.01, 0.01, 1e-4, (0.01 * 64) * (1 - 0.01 * 64) / 64**2),
        ("bfloat16", 1 + 2**-9, 1 + 2**-9, 2e-5, 2.0**-14 * 3 / 16),
    ],
)
def test_stochastic_rounding_keeps_the_mean_and_has_the_least_variance(name, z, mean, tolerance, variance):
    noise = uniform((200_000,), torch.tensor(12345678901234567), device=torch.device("cpu"))
    p = saturated(torch.full_like(noise, z), formats[name], "stochastic", noise).double()
    assert abs(float(p.mean()) - mean) <= tolerance
    assert float(p.var()) == pytest.approx(variance, rel=0.02, abs=0)
    assert len(p.unique()) <= 2


def test_stochastic_rounding_leaves_the_grid_alone():
    for name in BLOCKED:
        grid = torch.tensor(formats[name].grid)
        for noise in (0.0, 0.5, 1 - 2**-24):
            assert torch.equal(saturated(grid, formats[name], "stochastic", torch.full_like(grid, noise)), grid)


def test_noise_does_not_depend_on_how_a_tensor_is_cut():
    seed, cpu = torch.tensor(2**61 + 12345), torch.device("cpu")
    whole = uniform((7, 100), seed, device=cpu)
    parts = [uniform((100,), seed, device=cpu, first=100 * i) for i in range(7)]
    assert torch.equal(torch.stack(parts), whole)
    assert not torch.equal(uniform((100,), seed, device=cpu, first=2**32), whole[0])
    assert not torch.equal(uniform((100,), seed + 2**32, device=cpu), whole[0])


def test_noise_is_uniform_and_uncorrelated():
    u = uniform((2**20,), torch.tensor(987654321987654321), device=torch.device("cpu")).double()
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert torch.equal(u * 2**24, (u * 2**24).floor())
    counts = torch.histc(u, 256, 0, 1)
    chi2 = float(((counts - 4096) ** 2 / 4096).sum())
    assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)
    centred = u - u.mean()
    other = uniform((2**20,), torch.tensor(987654321987654322), device=torch.device("cpu")).double()
    for lag in (1, 2, 16, 32, 1024, 4096):
        assert abs(float((centred[lag:] * centred[:-lag]).mean()) * 12) < 5 / math.sqrt(2**20)
    assert abs(float((centred * (other - other.mean())).mean()) * 12) < 5 / math.sqrt(2**20)


def test_powers_of_two_are_exact():
    exponent = torch.arange(-127, 128, dtype=torch.int32)
    exact = torch.tensor([2.0**e for e in range(-127, 128)], dtype=F64)
    assert torch.equal(power_of_two(exponent, torch.float32).double(), exact)
    assert torch.equal(power_of_two(exponent, F64), exact)


@given(st.floats(2.0**-126, 2.0**127, width=32))
def test_the_power_below_comes_from_the_bits(z):
    power = floor_power(torch.tensor([z]), -126, 127).view(torch.float32).item()
    assert power == 2.0 ** (math.frexp(z)[1] - 1)


def test_negative_zero_keeps_its_sign():
    codes = encode(torch.tensor([0.0, 0.0]), torch.tensor([True, False]), formats["mxfp4"])
    assert codes.tolist() == [0x8, 0x0]
    assert decode(codes, formats["mxfp4"]).signbit().tolist() == [True, False]


def test_the_most_negative_integer():
    codes = encode(torch.tensor([128.0, 127.0]), torch.tensor([True, True]), formats["int8"])
    assert codes.tolist() == [-128, -127]
