"""The cast against worked cases, published error tables, and a naive float64 search of the enumerated grid."""

from __future__ import annotations

import math

import pytest
import torch
from effml_quant import Format, Quantizer, casting, fake_quantize, formats
from effml_quant.casting import Codes, dequantize_blocks, plain_cast, quantize_blocks, to_grid
from effml_quant.rounding import uniform
from effml_shared.errors import ConfigError, NonFiniteError
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

F64 = torch.float64
MX = ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp6_e2m3", "mxfp4", "mxint8")
RULES = ("floor", "rceil", "ceil", "even")
V = torch.tensor([0.95, -0.9, 0.88, 0.6, -0.3, 0.1, 0.01, 0.001] + [0.0] * 24)
# fmt: off
WORKED = [  # format, rule, scale byte, the first eight values
    ("mxfp8_e4m3", "floor", 118, [.875, -.875, .875, .625, -.3125, .1015625, .009765625, .0009765625]),
    ("mxfp8_e4m3", "rceil", 119, [.9375, -.875, .875, .625, -.3125, .1015625, .009765625, .0009765625]),
    ("mxfp8_e5m2", "floor", 111, [.875, -.875, .875, .625, -.3125, .09375, .009765625, .0009765625]),
    ("mxfp8_e5m2", "rceil", 112, [1.0, -.875, .875, .625, -.3125, .09375, .009765625, .0009765625]),
    ("mxfp6_e3m2", "floor", 122, [.875, -.875, .875, .625, -.3125, .09375, .009765625, .001953125]),
    ("mxfp6_e3m2", "rceil", 123, [1.0, -.875, .875, .625, -.3125, .09375, .01171875, 0]),
    ("mxfp6_e2m3", "floor", 124, [.9375, -.875, .875, .625, -.3125, .09375, .015625, 0]),
    ("mxfp6_e2m3", "rceil", 125, [.9375, -.875, .875, .625, -.3125, .09375, 0, 0]),
    ("mxfp4", "floor", 124, [.75, -.75, .75, .5, -.25, .125, 0, 0]),
    ("mxfp4", "rceil", 125, [1, -1, 1, .5, -.25, .125, 0, 0]),
    ("mxint8", "floor", 126, [.953125, -.8984375, .8828125, .6015625, -.296875, .1015625, .0078125, 0]),
]
CODES = {
    "mxfp8_e4m3": [0x7E, 0xFE, 0x7E, 0x7A, 0xF2, 0x65, 0x4A, 0x30],
    "mxfp8_e5m2": [0x7B, 0xFB, 0x7B, 0x79, 0xF5, 0x6E, 0x61, 0x54],
    "mxfp6_e3m2": [0x1F, 0x3F, 0x1F, 0x1D, 0x39, 0x12, 0x05, 0x01],
    "mxfp6_e2m3": [0x1F, 0x3E, 0x1E, 0x1A, 0x32, 0x06, 0x01, 0x00],
    "mxfp4": [0x7, 0xF, 0x7, 0x6, 0xC, 0x2, 0x0, 0x0],
    "mxint8": [122, 256 - 115, 113, 77, 256 - 38, 13, 1, 0],
}
ERRORS = {  # relative root-mean-square error of normal data: floor, rceil, ceil, even; shares clamped and on last code
    "mxfp8_e4m3": (.02939, .02655, .02655, .02760, .00859, .01158),
    "mxfp8_e5m2": (.05393, .05279, .05279, .05279, .00859, .01503),
    "mxfp6_e3m2": (.05393, .05280, .05280, .05280, .00859, .01503),
    "mxfp6_e2m3": (.02838, .02832, .03644, .02822, .00372, .00596),
    "mxfp4": (.11490, .11546, .14396, .11182, .02351, .05144),
}
BASELINES = [  # format, fields, relative error
    ("mxint8", {}, .00826),
    ("nvfp4", {}, .09530),
    ("int4", {}, .19197),
    ("int4", {"granularity": "channel"}, .11728),
    ("int4", {"block_size": 32}, .09697),
    ("int4", {"granularity": "channel", "recipe": "torchao"}, .11083),
    ("int8", {"granularity": "channel"}, .00647),
    ("int8", {"granularity": ("group", 32)}, .00534),
]
# fmt: on


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spread(*shape: int, seed: int = 0, low: int = -20, high: int = 20) -> Tensor:
    """Normal numbers times powers of two."""
    generator = torch.Generator().manual_seed(seed)
    power = torch.exp2(torch.randint(low, high, shape, generator=generator, dtype=torch.float64))
    return (torch.randn(shape, generator=generator).double() * power).float()


def relative_error(q: Tensor, x: Tensor) -> float:
    return float((q.double() - x.double()).norm() / x.double().norm())


def same(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are equal bit for bit, signs of zeros included; one NaN is as good as another."""
    here, there = a.isnan(), b.isnan()
    signs = torch.equal(a.signbit()[~here], b.signbit()[~here])
    return a.dtype == b.dtype and torch.equal(here, there) and torch.equal(a[~here], b[~here]) and signs


def naive(x: Tensor, name: str, rule: str, rounding: str, block: int = 32) -> Tensor:
    """Quantise rows in float64, one block and one element at a time, from the definitions."""
    fmt = formats[name]
    grid = torch.tensor(fmt.grid, dtype=F64)
    out = torch.empty(x.shape, dtype=F64)
    for row in range(len(x)):
        for first in range(0, x.shape[1], block):
            part = x[row, first : first + block].double()
            amax = float(part.abs().max())
            if not math.isfinite(amax):
                out[row, first : first + block] = math.nan
                continue
            below = math.frexp(amax)[1] - 1
            exponent = below - fmt.emax
            if rule == "rceil":
                exponent += amax > math.ldexp(fmt.max, exponent)
            elif rule == "ceil":
                exponent += amax > math.ldexp(1, below)
            elif rule == "even":
                exponent += amax >= math.ldexp(2 - 2.0 ** -(fmt.man_bits + 1), below)
            scale = math.ldexp(1, min(max(exponent, -127), 127)) if amax else 2.0**-127
            z = (part / scale).abs()
            distance = (z[:, None] - grid).abs()
            nearest = distance.min(1, keepdim=True).values
            if rounding == "toward_zero":
                index = (z[:, None] >= grid).sum(1) - 1
            elif rounding == "away":
                index = len(grid) - 1 - (distance.flip(1) == nearest).int().argmax(1)
            else:  # an even code, or the only one
                candidate = distance == nearest
                even = candidate & (torch.arange(len(grid)) % 2 == 0)
                index = torch.where(even.any(1, keepdim=True), even, candidate).int().argmax(1)
            out[row, first : first + block] = torch.where(part.signbit(), -grid[index], grid[index]) * scale
    return out


@pytest.mark.parametrize(("name", "rule", "byte", "values"), WORKED)
def test_worked_cases(name, rule, byte, values):
    q = Quantizer(name, scale_rule=rule)
    assert fake_quantize(V, q)[:8].tolist() == values
    assert fake_quantize(V, q)[8:].tolist() == [0] * 24
    assert quantize_blocks(V, q).scales.view(torch.uint8).tolist() == [byte]


@pytest.mark.parametrize("name", MX)
def test_worked_codes(name):
    codes = quantize_blocks(V, Quantizer(name)).codes.view(torch.uint8)
    assert codes[:8].tolist() == CODES[name]
    assert codes[8:].tolist() == [0] * 24


def test_worked_nvfp4():
    x = torch.cat([V[:8], torch.full((8,), 0.05), torch.tensor([6.0, -4.4, 3.0, 1.0]), torch.full((12,), 0.2)])
    codes = quantize_blocks(x, Quantizer("nvfp4"))
    assert float(codes.global_scale) == 448
    assert codes.scales.view(torch.uint8).tolist() == [0x69, 0x7E]
    assert codes.codes[:8].tolist() == [0x7, 0xF, 0x7, 0x6, 0xC, 0x1, 0x0, 0x0]
    out = fake_quantize(x, "nvfp4")
    wanted = [0.964286, -0.964286, 0.964286, 0.642857, -0.321429, 0.080357, 0, 0]
    torch.testing.assert_close(out[:8], torch.tensor(wanted), rtol=0, atol=5e-7)
    assert out[16:].tolist() == [6, -4, 3, 1] + [0] * 12


def test_worked_integers():
    int4, int8 = Quantizer("int4"), Quantizer("int8")
    assert quantize_blocks(V, int4).codes[:8].tolist() == [7, -7, 6, 4, -2, 1, 0, 0]
    assert float(quantize_blocks(V, int4).scales) == pytest.approx(0.135714, abs=5e-7)
    assert quantize_blocks(V, int8).codes[:8].tolist() == [127, -120, 118, 80, -40, 13, 1, 0]


def test_worked_asymmetric_integers():
    q = Quantizer("int4", recipe="asymmetric")
    codes = quantize_blocks(torch.tensor([-1.0, 0.0, 0.5, 2.0]), q)
    assert codes.codes.tolist() == [0, 5, 7, 15]  # 0.5 / 0.2 = 2.5 is a tie
    assert codes.zero_points.tolist() == [5]
    assert fake_quantize(torch.tensor([3.0, 4.0]), q).tolist() == pytest.approx([11 * 4 / 15, 4.0])


@pytest.mark.parametrize("name", ERRORS)
def test_published_errors_of_normal_data(name):
    torch.manual_seed(0)
    x = torch.randn(4096, 128)
    got = [relative_error(fake_quantize(x, name, scale_rule=rule), x) for rule in RULES]
    grid = to_grid(x, Quantizer(name))
    largest = formats[name].max
    got += [float((grid.z > largest).float().mean()), float((grid.p == largest).float().mean())]
    assert got == pytest.approx(ERRORS[name], rel=0, abs=6e-6)


@pytest.mark.parametrize(("name", "fields", "error"), BASELINES)
def test_published_errors_of_other_formats(name, fields, error):
    torch.manual_seed(0)
    x = torch.randn(4096, 128)
    assert relative_error(fake_quantize(x, name, **fields), x) == pytest.approx(error, rel=0, abs=6e-6)


@pytest.mark.parametrize(("name", "error"), [("mxfp8_e4m3", 0.041), ("mxfp4", 0.16)])
def test_errors_of_a_product_add_in_squares(name, error):
    x, w = normal(256, 512, seed=1), normal(256, 512, seed=2)
    qx, qw = fake_quantize(x, name), fake_quantize(w, name)
    wanted = math.hypot(relative_error(qx, x), relative_error(qw, w))
    assert relative_error(qx @ qw.T, x @ w.T) == pytest.approx(wanted, rel=0.05)
    assert wanted == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize("rounding", ["rne", "away", "toward_zero"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MX)
def test_the_naive_search_finds_the_same(name, rule, rounding):
    x = torch.cat([normal(3, 96), spread(3, 96), normal(3, 96, dtype=torch.bfloat16).float(), torch.zeros(1, 96)])
    x[9, 3], x[9, 40], x[9, 95] = 1e-44, -(2.0**-126), -0.0
    q = Quantizer(name, scale_rule=rule, rounding=rounding)
    wanted = naive(x, name, rule, rounding)
    assert same(fake_quantize(x, q).double(), wanted)
    assert same(plain_cast(x, q).double(), wanted)
    assert same(plain_cast(x.double(), q), wanted)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(MX),
    st.sampled_from(RULES),
    st.sampled_from(["rne", "away", "toward_zero"]),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=40),
    st.integers(1, 40),
)
def test_the_naive_search_finds_the_same_of_anything(name, rule, rounding, values, block):
    x = torch.tensor([values])
    q = Quantizer(name, scale_rule=rule, rounding=rounding, block_size=block)
    wanted = naive(x, name, rule, rounding, block)
    assert same(fake_quantize(x, q).double(), wanted)
    assert same(plain_cast(x, q).double(), wanted)


def microxcaling(x: Tensor, name: str, mode: str) -> Tensor:
    """Quantise blocks of 32 in the manner of microsoft/microxcaling: exponents by logarithm, one power at a time."""
    fmt = formats[name]
    blocks = x.double().reshape(-1, 32)
    shared = blocks.abs().amax(1, keepdim=True).clamp(min=2.0**-126).log2().floor() - fmt.emax
    a = blocks / 2**shared
    private = torch.zeros_like(a)
    if not fmt.is_integer:
        private = (a.abs() + (a == 0)).log2().floor().clamp(min=fmt.emin)
    a = a / 2**private * 2**fmt.man_bits
    a = a.sign() * (a.abs() + 0.5).floor() if mode == "nearest" else a.round()
    a = (a / 2**fmt.man_bits * 2**private).clamp(-fmt.max, fmt.max)
    return (a * 2**shared).reshape(x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MX)
def test_microxcalings_two_modes(name, dtype):
    x = normal(256, 128, dtype=dtype)
    away, even = fake_quantize(x, name, rounding="away"), fake_quantize(x, name)
    assert torch.equal(away.double(), microxcaling(x, name, "nearest"))
    assert torch.equal(even.double(), microxcaling(x, name, "even"))


@pytest.mark.parametrize(
    ("name", "percent"),
    [
        ("mxfp4", 0.7),
        ("mxfp8_e5m2", 1.7),
        ("mxfp6_e3m2", 1.7),
        ("mxfp6_e2m3", 2.5),
        ("mxfp8_e4m3", 3.2),
        ("mxint8", 8.7),
    ],
)
def test_ties_decide_many_elements_of_bfloat16_data(name, percent):
    x = normal(4096, 64, dtype=torch.bfloat16)
    differ = fake_quantize(x, name, rounding="away") != fake_quantize(x, name)
    assert 100 * float(differ.float().mean()) == pytest.approx(percent, abs=0.1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MX)
def test_quantising_twice_changes_nothing_and_powers_of_two_pass_through(name, rule):
    x = normal(64, 96, seed=3)
    once = fake_quantize(x, name, scale_rule=rule)
    assert same(fake_quantize(once, name, scale_rule=rule), once)
    for s in range(-20, 21):
        assert same(fake_quantize(x * 2.0**s, name, scale_rule=rule), once * 2.0**s)


@pytest.mark.parametrize("fields", [{}, {"granularity": "channel"}, {"block_size": 32}])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_codes_of_quantised_integers_stay(name, fields):
    q = Quantizer(name, **fields)
    codes = quantize_blocks(normal(64, 96), q)
    again = quantize_blocks(dequantize_blocks(codes, q, torch.float32), q)
    assert torch.equal(again.codes, codes.codes)


def test_the_wider_integer_range_clips_its_largest_value_again():
    x = torch.tensor([7.5, -7.5, 1.0])
    once = fake_quantize(x, "int4", recipe="torchao")
    assert once.tolist() == [7, -8, 1]
    assert fake_quantize(torch.tensor([7.5, 1.0]), "int4", recipe="torchao")[0] == 7
    assert fake_quantize(torch.tensor([7.0, 1.0]), "int4", recipe="torchao")[0] < 7


@pytest.mark.parametrize("name", MX)
def test_blocks_of_zeros_nan_and_infinity(name):
    x = normal(5, 32)
    x[1], x[2, 7], x[3, 31] = 0, math.nan, -math.inf
    q = Quantizer(name)
    codes, out = quantize_blocks(x, q), fake_quantize(x, q)
    assert codes.scales[1:4].view(torch.uint8).flatten().tolist() == [0, 255, 255]
    assert not bool(codes.codes[1:4].view(torch.uint8).any())
    assert bool(out[2:4].isnan().all())
    assert bool((out[1] == 0).all())
    assert torch.equal(out[[0, 4]], fake_quantize(x[[0, 4]], q))


@pytest.mark.parametrize("recipe", [None, "torchao", "asymmetric"])
def test_integer_blocks_with_a_nan(recipe):
    x = normal(2, 8)
    x[0, 3] = math.nan
    out = fake_quantize(x, "int8", granularity="channel", recipe=recipe)
    assert bool(out[0].isnan().all())
    assert torch.equal(out[1:], fake_quantize(x[1:], "int8", granularity="channel", recipe=recipe))


def test_nvfp4_blocks_with_an_infinity_leave_the_rest_alone():
    x = normal(4, 16)
    x[1, 2] = math.inf
    kept = x[[0, 2, 3]]
    out = fake_quantize(x, "nvfp4")
    assert bool(out[1].isnan().all())
    assert torch.equal(out[[0, 2, 3]], fake_quantize(kept, "nvfp4"))


@pytest.mark.parametrize("name", [*MX, "nvfp4", "int4", "bfloat16"])
def test_subnormal_inputs_stay_finite(name):
    for dtype in (torch.float32, torch.float16, torch.bfloat16, F64):
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        x = (torch.arange(-32, 32) * least).to(dtype)
        out = fake_quantize(x, name)
        assert out.dtype == dtype
        assert bool(out.isfinite().all())
        assert bool(((out == 0) | (out.signbit() == x.signbit())).all())


def test_the_smallest_scale_underflows_gracefully():
    x = torch.tensor([2.0**-126, 2.0**-127, 2.0**-128, 2.0**-149])
    assert fake_quantize(x, "mxfp4").tolist() == [2.0**-126, 2.0**-127, 2.0**-128, 0]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [*MX, "nvfp4", "int8", "bfloat16"])
def test_rounding_up_never_leaves_the_dtype(name, dtype, rule):
    bound = torch.finfo(dtype).max
    x = torch.tensor([bound, -bound, bound / 2, 1.0], dtype=dtype)
    q = Quantizer(name, scale_rule=rule)
    out = fake_quantize(x, q)
    assert bool(out.isfinite().all())
    if name != "bfloat16":
        assert same(dequantize_blocks(quantize_blocks(x, q), q, dtype), out) or name.startswith("int")
    if (name, dtype) == ("mxfp8_e4m3", torch.float16):
        assert out[0] == (57344 if rule == "floor" else 65504)


def test_nvfp4_blocks_too_small_for_their_scale_are_zero():
    """Elements times the largest float32 must not turn into NaN on the way."""
    x = torch.zeros(64, 16)
    x[0, 0] = 1
    x[1:] = torch.exp2(-torch.arange(1.0, 64)).mul(1.5)[:, None]
    out = fake_quantize(x, "nvfp4")
    assert bool(out.isfinite().all())
    assert bool((out[20:] == 0).all())
    codes = quantize_blocks(x, Quantizer("nvfp4"))
    assert codes.codes[21].tolist() == [0x7] * 16
    assert bool((codes.scales[21].float() == 0).all())


@pytest.mark.parametrize("fields", [{}, {"block_size": 5}, {"format": "nvfp4"}, {"format": "int4", "block_size": 7}])
def test_any_axis_and_layout(fields):
    q = Quantizer(**({"format": "mxfp4"} | fields))
    x = normal(33, 40, 3)
    for axis in range(3):
        moved = fake_quantize(x.movedim(axis, -1), q).movedim(-1, axis)
        assert torch.equal(fake_quantize(x, q.replace(axis=axis)), moved)
        assert torch.equal(fake_quantize(x, q.replace(axis=axis - 3)), moved)
    assert torch.equal(fake_quantize(x[::2, :, ::2], q), fake_quantize(x[::2, :, ::2].contiguous(), q))
    assert fake_quantize(normal(2, 3, 4, 5, 33), q).shape == (2, 3, 4, 5, 33)
    assert fake_quantize(x.flatten(), q).shape == (33 * 40 * 3,)


@pytest.mark.parametrize("name", MX)
def test_a_short_tail_is_a_block_of_its_own(name):
    x = normal(4, 33)
    out = fake_quantize(x, name)
    assert torch.equal(out[:, :32], fake_quantize(x[:, :32], name))
    assert torch.equal(out[:, 32:], fake_quantize(x[:, 32:], name))
    assert quantize_blocks(x, Quantizer(name)).scales.shape == (4, 2)


@pytest.mark.parametrize("shape", [(0,), (0, 32), (4, 0), (2, 0, 3)])
@pytest.mark.parametrize("name", [*MX, "nvfp4", "int4", "bfloat16"])
def test_empty_tensors(name, shape):
    assert fake_quantize(torch.empty(shape), name).shape == shape
    if name != "bfloat16":
        q = Quantizer(name)
        assert dequantize_blocks(quantize_blocks(torch.empty(shape), q), q, torch.float32).shape == shape


def test_scalars_under_one_scale():
    assert fake_quantize(torch.tensor(3.3), "int4") == torch.tensor(3.3)
    assert fake_quantize(torch.tensor(3.3), "mxfp4", granularity="tensor") == 3
    assert fake_quantize(torch.tensor(3.3), "bfloat16") == torch.tensor(3.3).bfloat16()


def test_a_tile_quantises_a_matrix_and_its_transpose_alike():
    w = normal(48, 40)
    for name in ("nvfp4", "mxfp4"):
        q = Quantizer(name, block_size=(16, 16))
        assert torch.equal(fake_quantize(w.T, q), fake_quantize(w, q).T)
        assert quantize_blocks(w, q).scales.shape == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, F64])
def test_bfloat16_is_torchs_cast_but_saturates(dtype):
    x = spread(4096, low=-14, high=10).to(dtype)
    special = [math.nan, math.inf, -math.inf, torch.finfo(dtype).max, -0.0, 1 + 2.0**-8]
    x[:6] = torch.tensor(special, dtype=dtype)
    out = fake_quantize(x, "bfloat16")
    wanted = x.bfloat16().to(dtype)
    wanted[3] = min(torch.finfo(torch.bfloat16).max, torch.finfo(dtype).max)
    assert same(out, wanted)
    y = normal(10, dtype=torch.bfloat16)
    assert torch.equal(fake_quantize(y, "bf16"), y)


def test_double_precision_is_not_narrowed():
    x = torch.tensor([1 + 2.0**-40, 1e-200, 3.0], dtype=F64)
    assert fake_quantize(x, "int8")[2] == 3
    assert fake_quantize(torch.tensor([1.25 - 2.0**-40, 4.0], dtype=F64), "mxfp4")[0] == 1
    assert fake_quantize(torch.tensor([1.25 + 2.0**-40, 4.0], dtype=F64), "mxfp4")[0] == 1.5
    assert fake_quantize(torch.tensor([2.0**979 * 1.3, -1e308], dtype=F64), "bfloat16").isfinite().all()


def test_huge_asymmetric_ranges_do_not_overflow():
    out = fake_quantize(torch.tensor([3e38, -3e38, 1e38]), "int8", recipe="asymmetric")
    torch.testing.assert_close(out, torch.tensor([3e38, -3e38, 1e38]), rtol=0, atol=6e38 / 255)


def test_asymmetric_ranges_of_subnormal_numbers():
    x = torch.tensor([-20.0, 2.0, 7.0]) * 2.0**-149
    q = Quantizer("int4", recipe="asymmetric")
    codes = quantize_blocks(x, q)
    assert int(codes.zero_points) <= 15
    assert torch.equal(dequantize_blocks(codes, q, torch.float32), fake_quantize(x, q))


def test_stochastic_rounding_is_unbiased_and_follows_its_generator():
    x = normal(4, 32).repeat(2000, 1)
    fields = {"rounding": "stochastic", "scale_rule": "rceil"}
    out = fake_quantize(x, "mxfp4", generator=torch.Generator().manual_seed(5), **fields)
    assert torch.equal(out, fake_quantize(x, "mxfp4", generator=torch.Generator().manual_seed(5), **fields))
    assert not torch.equal(out, fake_quantize(x, "mxfp4", generator=torch.Generator().manual_seed(6), **fields))
    grid = to_grid(x[:4], Quantizer("mxfp4", scale_rule="rceil", rounding="toward_zero"))
    spacing = torch.exp2(grid.z.log2().floor().clamp(0, 2) - 1) * grid.scale.decode
    mean = out.reshape(2000, 4, 32).double().mean(0)
    assert bool(((mean - x[:4]).abs() < 5 * spacing.reshape(4, 32) / 2 / math.sqrt(2000)).all())
    torch.manual_seed(9)
    a = fake_quantize(x, "mxfp4", **fields)
    torch.manual_seed(9)
    assert torch.equal(a, fake_quantize(x, "mxfp4", **fields))


def test_stochastic_rounding_does_not_depend_on_chunks():
    x, seed = normal(8, 64), torch.tensor(2**60 + 17)
    q = Quantizer("mxfp4", rounding="stochastic", scale_rule="rceil")
    whole = to_grid(x, q, seed=seed)
    for row in range(8):
        noise = uniform((64,), seed, device=x.device, first=64 * row)
        assert torch.equal(to_grid(x[row], q, noise=noise).p, whole.p[row])


def test_under_deterministic_algorithms_a_generator_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(ConfigError, match=r"generator: got None under deterministic algorithms"):
        fake_quantize(V, "mxfp4", rounding="stochastic")
    fake_quantize(V, "mxfp4", rounding="stochastic", generator=torch.Generator())


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp4", "nvfp4", "int4", "bfloat16"])
def test_gradients_pass_straight_through(name):
    x = normal(4, 32).requires_grad_()
    out = fake_quantize(x, name)
    gradient = normal(4, 32, seed=1)
    out.backward(gradient)
    assert torch.equal(x.grad, gradient)
    assert same(out.detach(), fake_quantize(x.detach(), name))


def test_no_gradient_where_the_value_saturated():
    x = torch.tensor([7.9, -7.9, 6.0, -6.1, 1.0, 0.0], requires_grad=True)
    fake_quantize(x, "mxfp4", pass_through="clipped").sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 0, 1, 1]
    x.grad = None
    fake_quantize(x, "mxfp4", pass_through="clipped", scale_rule="rceil").sum().backward()
    assert x.grad.tolist() == [1] * 6
    y = torch.tensor([7.5, -7.5], requires_grad=True)
    fake_quantize(y, "int4", pass_through="clipped", recipe="torchao").sum().backward()
    assert y.grad.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["mxfp6_e2m3", "nvfp4", "int4"])
def test_vmap(name):
    x = normal(3, 5, 40)
    rows = torch.func.vmap(lambda row: fake_quantize(row, name))(x)
    assert torch.equal(rows, torch.stack([fake_quantize(row, name) for row in x]))
    columns = torch.func.vmap(lambda row: fake_quantize(row, name), in_dims=1)(x)
    assert torch.equal(columns, torch.stack([fake_quantize(x[:, i], name) for i in range(5)]))
    slope = torch.func.vmap(torch.func.grad(lambda row: fake_quantize(row, name).square().sum()))(x)
    assert torch.equal(slope, 2 * rows)


@pytest.mark.parametrize(
    ("name", "fields"), [("mxfp4", {"pass_through": "clipped"}), ("nvfp4", {"rounding": "stochastic"})]
)
def test_compiled_is_eager(name, fields):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: fake_quantize(x, name, **fields), fullgraph="rounding" not in fields)
    results = []
    for call in (lambda x: fake_quantize(x, name, **fields), compiled):
        torch.manual_seed(0)
        x = normal(8, 40, dtype=torch.bfloat16).requires_grad_()
        out = call(x)
        out.sum().backward()
        results.append((out.detach(), x.grad))
    assert same(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_users_own_format():
    fmt = Format.floating("e3m4", 3, 4)
    x = normal(8, 64)
    q = Quantizer(fmt, block_size=8)
    out = fake_quantize(x, q)
    assert torch.equal(dequantize_blocks(quantize_blocks(x, q), q, torch.float32), out)
    assert 0 < relative_error(out, x) < relative_error(fake_quantize(x, "mxfp6_e3m2", block_size=8), x)
    wide = Format.floating("e4m7", 4, 7)
    assert relative_error(fake_quantize(x, wide), x) < 0.003
    with pytest.raises(ConfigError, match=r"format: got e4m7 of 12 bits, expected codes of at most 8"):
        quantize_blocks(x, Quantizer(wide))


def test_a_scale_of_the_tensor_from_outside():
    x = normal(4, 32)
    default = quantize_blocks(x, Quantizer("nvfp4")).global_scale
    assert torch.equal(fake_quantize(x, "nvfp4", global_scale=default), fake_quantize(x, "nvfp4"))
    assert torch.equal(fake_quantize(x, "nvfp4", global_scale=float(default)), fake_quantize(x, "nvfp4"))
    assert not torch.equal(fake_quantize(x, "nvfp4", global_scale=1.0), fake_quantize(x, "nvfp4"))


def test_nan_scales_read_from_a_file_mean_nan_in_every_format():
    codes = torch.zeros(32, dtype=torch.uint8).view(torch.float8_e5m2)
    scales = torch.tensor([255], dtype=torch.uint8).view(torch.float8_e8m0fnu)
    assert dequantize_blocks(Codes(codes, scales, None, None), Quantizer("mxfp8_e5m2"), torch.float32).isnan().all()


@pytest.mark.parametrize(
    ("x", "fields", "message"),
    [
        (torch.arange(4), {}, r"x: got torch.int64 \(torch.strided\), expected a dense float16"),
        (torch.ones(4, dtype=torch.complex64), {}, r"x: got torch.complex64"),
        (torch.ones(4).to(torch.float8_e5m2), {}, r"x: got torch.float8_e5m2"),
        (torch.ones(4, 4).to_sparse(), {}, r"x: got torch.float32 \(torch.sparse_coo\)"),
        ([1.0, 2.0], {}, r"x: got list"),
        (V, {"axis": 1}, r"axis: got a tensor of shape \(32,\), expected one that has axis 1"),
        (torch.tensor(1.0), {}, r"axis: got a tensor of shape \(\), expected one that has axis -1"),
        (V, {"block_size": (16, 16)}, r"expected one that has tiles of 16 x 16"),
        (V, {"pass_through": "none"}, r"pass_through: got 'none', expected 'all' or 'clipped'"),
        (V, {"global_scale": 1.0}, r"global_scale: got one for mxfp4, expected None: only nvfp4 has it"),
        (V, {"fmt": "nvfp4", "global_scale": -1.0}, r"global_scale: got -1.0, expected one positive finite number"),
        (V, {"fmt": "nvfp4", "global_scale": 0}, r"global_scale: got 0, expected"),
        (V, {"fmt": "nvfp4", "global_scale": math.inf}, r"global_scale: got inf, expected"),
        (V, {"fmt": "nvfp4", "global_scale": math.nan}, r"global_scale: got nan, expected"),
        (V, {"fmt": "nvfp4", "global_scale": torch.ones(2)}, r"global_scale: got tensor"),
        (V, {"fmt": "nvfp4", "global_scale": "1"}, r"global_scale: got '1', expected a number"),
    ],
)
def test_errors(x, fields, message):
    with pytest.raises(ConfigError, match=message):
        fake_quantize(x, **({"fmt": "mxfp4"} | fields))


def test_nonfinite_values_can_be_an_error():
    x = V.clone()
    x[3], x[5] = math.nan, math.inf
    with pytest.raises(NonFiniteError, match=r"x: got 2 of 32 values NaN or infinite; nonfinite='nan_block'"):
        fake_quantize(x, "mxfp4", nonfinite="raise")
    assert torch.equal(fake_quantize(V, "mxfp4", nonfinite="raise"), fake_quantize(V, "mxfp4"))


def test_elements_of_no_scale_have_no_codes():
    with pytest.raises(ConfigError, match=r"format: got bfloat16, expected one with a scale"):
        quantize_blocks(V, Quantizer("bfloat16"))


def test_stochastic_rounding_that_saturates_says_so_once(caplog):
    casting._say_biased.cache_clear()
    x = torch.randn(4, 32)
    fake_quantize(x, "mxfp4", rounding="stochastic", scale_rule="rceil")
    assert not caplog.records
    for _ in range(2):
        fake_quantize(x, "mxfp4", rounding="stochastic")
    assert [record.message for record in caplog.records] == [
        "stochastic rounding is biased under scale_rule='floor', where values saturate; use 'rceil'"
    ]
